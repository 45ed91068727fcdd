//go:build linux

package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/atollvm/atoll/internal/build/child"
	"github.com/atollvm/atoll/internal/build/vmexec"
	"github.com/atollvm/atoll/internal/hint"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	solvererrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// failedStep is in BuildKit's error of a RUN whose command failed.
const failedStep = "did not complete successfully"

// keptLines of a failing step's output go into the error.
const keptLines = 20

// fullDisk is how little is left when a step's own "no space left" is put down to the host's disk.
const fullDisk = 64 << 20

// steps remembers each step's name and last lines.
type steps struct {
	byDigest map[digest.Digest]*step
	failed   string // name of the first step with an error of its own
}

type step struct {
	name   string
	output []byte
}

func newSteps() *steps { return &steps{byDigest: map[digest.Digest]*step{}} }

func (s *steps) at(d digest.Digest) *step {
	if s.byDigest[d] == nil {
		s.byDigest[d] = &step{}
	}
	return s.byDigest[d]
}

func (s *steps) follow(status *client.SolveStatus) {
	for _, v := range status.Vertexes {
		s.at(v.Digest).name = v.Name
		if v.Error != "" && s.failed == "" && !strings.HasSuffix(v.Error, context.Canceled.Error()) {
			s.failed = v.Name
		}
	}
	for _, l := range status.Logs {
		v := s.at(l.Vertex)
		v.output = tail(append(v.output, l.Data...))
	}
}

// tail cuts output to its last lines.
func tail(output []byte) []byte {
	at := len(output) - 1 // the last byte may be the newline that ends the last line
	for range keptLines {
		if at = bytes.LastIndexByte(output[:max(at, 0)], '\n'); at < 0 {
			return output
		}
	}
	return output[at+1:]
}

var unresolved = regexp.MustCompile(`failed to resolve source metadata for ([^\s]+): (.*)`)

// explain turns BuildKit's error into ours: class, the failing step's last lines, the guilty line of the Dockerfile, the next step.
func (b *Builder) explain(ctx context.Context, p *process, s *steps, r Request, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if code := grpcerrors.Code(err); code == codes.Unavailable || code == codes.Canceled {
		// The connection breaks a moment before the child is known to be dead.
		select {
		case <-p.done:
			return p.err
		case <-time.After(time.Second):
		}
	}

	text := redactAll(noise.ReplaceAllString(strings.TrimPrefix(err.Error(), "failed to solve: "), ""))
	var output string
	var details strings.Builder
	var vertex *solvererrdefs.VertexError
	if errors.As(err, &vertex) {
		if v := s.byDigest[digest.Digest(vertex.Vertex.Digest)]; v != nil && len(v.output) > 0 {
			output = string(bytes.TrimRight(v.output, "\n"))
			if r.Quiet && strings.Contains(text, failedStep) { // else it has been seen, or is in the text
				fmt.Fprintf(&details, "\n------\n > %s:\n%s\n------", v.name, output)
			}
		}
	}
	sources := solvererrdefs.Sources(err)
	if len(sources) == 0 {
		// BuildKit gives no line for what it fetches, as ADD of a URL.
		_, instruction, ok := strings.Cut(s.failed, "] ")
		if src := r.findLine(instruction); ok && src != nil {
			sources = append(sources, src)
		} else if ok && !strings.HasPrefix(s.failed, "[internal]") {
			text = instruction + ": " + text
		}
	}
	for _, src := range sources {
		var lines bytes.Buffer
		if src.Print(&lines) == nil && lines.Len() > 0 {
			fmt.Fprintf(&details, "\n%s", bytes.TrimRight(lines.Bytes(), "\n"))
		}
	}

	if full := b.diskFull(text, output); full != "" {
		return hint.With(errdefs.ErrResourceExhausted.WithMessage(full+": "+text+details.String()), "free some space on that disk (atoll builder prune), then build again")
	}
	if m := unresolved.FindStringSubmatch(text); m != nil {
		return b.unknownBase(m[1], m[2], details.String())
	}
	if strings.Contains(output, "exec format error") { // runc's, or a shell's
		text += ": exec format error"
	}
	for _, k := range known {
		if m := k.pattern.FindStringSubmatch(text); m != nil {
			err := k.class.WithMessage(text + details.String())
			if k.hint == "" {
				return err
			}
			next := k.hint
			if len(m) > 1 {
				next = fmt.Sprintf(k.hint, m[1])
			}
			return hint.With(err, "%s", next)
		}
	}
	if m := missingFile.FindStringSubmatch(text); m != nil && len(sources) > 0 {
		return hint.With(errdefs.ErrInvalidArgument.WithMessage(m[1]+" is not in the build context, or in the stage that COPY names"+details.String()),
			"see whether the file is there, and whether .dockerignore leaves it out")
	}
	if len(sources) > 0 || strings.Contains(text, "ockerfile") {
		return errdefs.ErrInvalidArgument.WithMessage(text + details.String())
	}
	return fmt.Errorf("%s%s: %w", text, details.String(), errdefs.Resolve(err))
}

// missingFile is BuildKit's error of a COPY without its source.
var missingFile = regexp.MustCompile(`^("[^"]+"): not found$`)

// noise is what BuildKit says of its own doings.
var noise = regexp.MustCompile(`failed to load cache key: |failed to compute cache key: (failed to calculate checksum of ref \S+: )?`)

// findLine finds the one line of a Dockerfile that is an instruction, word for word.
func (r Request) findLine(instruction string) *solvererrdefs.Source {
	data, name := r.DockerfileText, "Dockerfile"
	if data == nil && r.ContextDir != "" {
		path, err := localDockerfile(r.ContextDir, r.Dockerfile)
		if err != nil {
			return nil
		}
		if data, err = os.ReadFile(path); err != nil {
			return nil
		}
		name = filepath.Base(path)
	}
	found := 0
	for i, line := range strings.Split(string(data), "\n") {
		if strings.TrimSpace(line) != instruction {
			continue
		}
		if found > 0 {
			return nil
		}
		found = i + 1
	}
	if found == 0 {
		return nil
	}
	at := &pb.Position{Line: int32(found)}
	return &solvererrdefs.Source{Info: &pb.SourceInfo{Filename: name, Data: data}, Ranges: []*pb.Range{{Start: at, End: at}}}
}

// messager is a class of errdefs.
type messager interface{ WithMessage(string) error }

// known are BuildKit's texts that have a class and a next step; the hint may use the pattern's first group.
var known = []struct {
	pattern *regexp.Regexp
	class   messager
	hint    string
}{
	{regexp.MustCompile(`target stage`), errdefs.ErrNotFound, "name a stage that the Dockerfile has: FROM … AS name"},
	{regexp.MustCompile(child.NoRunc), errdefs.ErrFailedPrecondition, "apt install runc, or build with --isolation vm"},
	{regexp.MustCompile(vmexec.OutOfMemory), errdefs.ErrResourceExhausted, "give builds more: vmMemory in the section [build] of the settings file"},
	{regexp.MustCompile(`exec format error|no support for running processes with`), errdefs.ErrFailedPrecondition,
		"a RUN step for another platform needs that platform: leave --platform out, build on such a host, or use RUN only in stages FROM --platform=$BUILDPLATFORM"},
	{regexp.MustCompile(failedStep), errdefs.ErrFailedPrecondition, ""},
	{regexp.MustCompile(`secret ([^\s:]+): not found`), errdefs.ErrNotFound, "give it: --secret id=%s,src=FILE or --secret id=%[1]s,env=NAME"},
	{regexp.MustCompile(`SSH agent "([^"]+)": not found`), errdefs.ErrNotFound, "start an agent (eval $(ssh-agent); ssh-add) and give --ssh %s, or a key: --ssh %[1]s=FILE"},
	{regexp.MustCompile(`repository does not contain ref|couldn't find remote ref|not our ref|unadvertised object|reference is not a tree|invalid subdir`), errdefs.ErrNotFound,
		"the part after # is REF or REF:SUBDIR; git ls-remote lists a repository's refs"},
	{regexp.MustCompile(`executable file not found in \$PATH.*git|"git": executable file not found`), errdefs.ErrFailedPrecondition, "apt install git"},
	{regexp.MustCompile(`exec: "(xz|unxz)": executable file not found`), errdefs.ErrFailedPrecondition, "apt install xz-utils"},
	{regexp.MustCompile(`git stderr:`), errdefs.ErrUnavailable, "see whether git ls-remote works with this repository as the daemon's user"},
	{regexp.MustCompile(`invalid response status (?:404|410)`), errdefs.ErrNotFound, "see whether the URL is right"},
	{regexp.MustCompile(`invalid response status|Get "https?://`), errdefs.ErrUnavailable, "see whether the URL is right and can be reached from this host"},
	{regexp.MustCompile(`failed to read dockerfile: (?:open .*)`), errdefs.ErrInvalidArgument, "name the Dockerfile in the context with -f"},
}

// inURL finds passwords in URLs.
var inURL = regexp.MustCompile(`(://[^/\s:@]*):[^/\s@]+@`)

func redactAll(text string) string { return inURL.ReplaceAllString(text, "$1:xxxxx@") }

// unreachable are the words of registries that gave no answer.
var unreachable = []string{"connection refused", "no such host", "i/o timeout", "network is unreachable", "no route to host", "connection reset", "EOF",
	"failed to do request", "server misbehaving", "certificate", "TLS handshake", "deadline exceeded"}

// unknownBase is the error for an image that is neither in the store nor to be had from its registry.
func (b *Builder) unknownBase(image, why, details string) error {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return errdefs.ErrInvalidArgument.WithMessage(why + details)
	}
	name := reference.FamiliarString(named)
	says := "its registry says"
	for _, word := range unreachable {
		if strings.Contains(why, word) {
			says = "its registry cannot be reached"
		}
	}
	message := fmt.Sprintf("image %s is not in the image store, and %s: %s%s", name, says, why, details)
	// A registry tells strangers 401 or 403 of what it does not have.
	class := errdefs.ErrUnavailable.WithMessage(message)
	for _, answer := range []string{"not found", "403", "401", "denied", "authorization failed"} {
		if strings.Contains(why, answer) {
			class = errdefs.ErrNotFound.WithMessage(message)
		}
	}
	if strings.Contains(details, ">>> COPY") || strings.Contains(details, ">>> RUN") {
		return hint.With(class, "name a stage of the Dockerfile (FROM … AS %s), or: atoll pull %[1]s", reference.FamiliarName(named))
	}
	if b.o.KnownBase != nil && b.o.KnownBase(named) {
		return hint.With(class, "atoll base build %s, or atoll pull %s", name, name)
	}
	return hint.With(class, "atoll pull %s", name)
}

// diskFull says which disk is full, or "". A step that fails by itself because of it only says so in its output.
func (b *Builder) diskFull(text, output string) string {
	const enospc = "no space left on device"
	certain := strings.Contains(text, enospc)
	if !certain && !strings.Contains(strings.ToLower(output), enospc) {
		return ""
	}
	dir, free := b.o.Dir, uint64(0)
	for i, d := range []string{b.o.Dir, b.o.ContentDir} {
		var fs unix.Statfs_t
		if unix.Statfs(d, &fs) != nil {
			continue
		}
		if f := fs.Bavail * uint64(fs.Bsize); i == 0 || f < free {
			dir, free = d, f
		}
	}
	if !certain && free > fullDisk {
		return ""
	}
	return fmt.Sprintf("the disk of %s is full (%d bytes free)", dir, free)
}
