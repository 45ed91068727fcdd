# Atoll. `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export CGO_ENABLED := 0
# The version is stamped by the linker; git may refuse a checkout of another user.
export GOFLAGS := -buildvcs=false

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT  := $(shell git rev-parse HEAD 2>/dev/null)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
AGENT   := internal/agent/embedded/bin
GOARCH  ?= $(shell go env GOARCH)
SUDO    := $(if $(filter 0,$(shell id -u)),,sudo)
PACKAGES := ca-certificates curl uidmap $(if $(filter arm64,$(GOARCH)),qemu-system-arm,qemu-system-x86) mmdebstrap runc e2fsprogs erofs-utils busybox-static
# Contexts and archives of builds.
PACKAGES += git openssh-client xz-utils zstd bzip2
# What atoll kernel build uses.
PACKAGES += gcc make flex bison bc perl libc6-dev libelf-dev libssl-dev
# What a disk image with its own system boots with, and what the tests make one with.
PACKAGES += $(if $(filter arm64,$(GOARCH)),qemu-efi-aarch64,ovmf) qemu-utils fdisk dosfstools mtools $(if $(filter amd64,$(GOARCH)),grub-pc-bin grub-efi-amd64-bin)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: bin/atoll ## build bin/atoll, with the guest's agent inside

.PHONY: bin/atoll
bin/atoll: agent
	@mkdir -p bin
	go build -ldflags '$(LDFLAGS)' -o bin/atoll ./cmd/atoll

.PHONY: agent
agent: agent-$(GOARCH)

agent-%:
	@GOOS=linux GOARCH=$* go build -ldflags '-s -w' -o $(AGENT)/$*/atoll-agent.new ./cmd/atoll-agent
	@# An unchanged agent keeps its time, so that nothing that embeds it is built anew.
	@cmp -s $(AGENT)/$*/atoll-agent.new $(AGENT)/$*/atoll-agent 2>/dev/null && rm $(AGENT)/$*/atoll-agent.new || mv $(AGENT)/$*/atoll-agent.new $(AGENT)/$*/atoll-agent

.PHONY: deps
deps: ## install the Debian packages that Atoll uses on a host (as root or with sudo)
	@missing=; for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'install ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing:$$missing"; $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

.PHONY: demo
demo: deps build ## set up, build examples/hello, run it, fetch its page, clean up
	@scripts/demo

.PHONY: test
test: deps build ## all tests: unit, and end to end with real machines
	@scripts/test

.PHONY: bench
bench: deps build ## measure, and write docs/benchmarks.md
	@scripts/bench

.PHONY: lint
lint: ## gofmt, vet, staticcheck, errorlint, sloglint, misspell
	@scripts/lint

.PHONY: cross
cross: agent-amd64 agent-arm64 ## compile for every platform we serve
	GOOS=linux GOARCH=amd64 go build -o /dev/null ./cmd/atoll
	GOOS=linux GOARCH=arm64 go build -o /dev/null ./cmd/atoll
	GOOS=darwin GOARCH=arm64 go build -o /dev/null ./cmd/atoll

.PHONY: generate
generate: ## write anew what is made from api/*.proto and the commands (needs protobuf-compiler, libprotobuf-dev)
	@mkdir -p bin
	go build -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go github.com/planetscale/vtprotobuf/cmd/protoc-gen-go-vtproto
	protoc -I . --plugin=bin/protoc-gen-go --plugin=bin/protoc-gen-connect-go --go_out=. --go_opt=module=github.com/atollvm/atoll \
	  --connect-go_out=. --connect-go_opt=module=github.com/atollvm/atoll api/atoll/v1/atoll.proto
	protoc -I . --plugin=bin/protoc-gen-go --plugin=bin/protoc-gen-go-vtproto --go_out=. --go_opt=module=github.com/atollvm/atoll \
	  --go-vtproto_out=. --go-vtproto_opt=module=github.com/atollvm/atoll,features=marshal+unmarshal+size api/agent/v1/agent.proto

.PHONY: clean
clean: ## remove what was built (not ATOLL_HOME)
	rm -rf bin $(AGENT)/*/atoll-agent
