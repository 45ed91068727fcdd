package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	dockerconfig "github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/credentials"
	"github.com/docker/cli/cli/config/types"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
	"github.com/atollvm/atoll/internal/hint"
)

const (
	dockerHub    = "docker.io"
	dockerHubKey = "https://index.docker.io/v1/" // what Docker's files call it
)

func newLoginCmd(e *environment) *cobra.Command {
	var user, password string
	var fromStdin bool
	cmd := &cobra.Command{
		Use:   "login [OPTIONS] [REGISTRY]",
		Short: "Log in to a registry",
		Long: `Log in to a registry (default: Docker Hub). The name and the password are
verified by the registry and kept where Docker keeps them: in config.json of
$DOCKER_CONFIG (default: ~/.docker), or with the credential helper that is named
there.`,
		Example: `  atoll login -u ann --password-stdin registry.example.com <token`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			host, key := registryOf(args)
			file, err := e.dockerConfig()
			if err != nil {
				return err
			}
			if password != "" && !fromStdin {
				ui.Warnings(e.Stderr, []string{"a password on the command line is seen by others: use --password-stdin"})
			}
			if user, password, err = e.askLogin(host, user, password, fromStdin); err != nil {
				return err
			}
			c, err := e.connect(cmd.Context())
			if err != nil {
				return err
			}
			_, err = c.Images.Login(cmd.Context(), connect.NewRequest(&atollv1.LoginRequest{Registry: host, Username: user, Password: password}))
			if err != nil {
				return err
			}
			if err := e.storeLogin(file, key, user, password); err != nil {
				return fmt.Errorf("keeping the login to %s: %w", host, err)
			}
			fmt.Fprintln(e.Stdout, "Login Succeeded")
			return nil
		},
	}
	cmd.Flags().StringVarP(&user, "username", "u", "", "name")
	cmd.Flags().StringVarP(&password, "password", "p", "", "password or access token")
	cmd.Flags().BoolVar(&fromStdin, "password-stdin", false, "read the password from standard input")
	cmd.MarkFlagsMutuallyExclusive("password", "password-stdin")
	return cmd
}

func newLogoutCmd(e *environment) *cobra.Command {
	return &cobra.Command{
		Use:     "logout [REGISTRY]",
		Short:   "Forget the login to a registry",
		Example: `  atoll logout registry.example.com`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			host, key := registryOf(args)
			file, err := e.dockerConfig()
			if err != nil {
				return err
			}
			if helper := helperOf(file, key); helper != "" {
				if err := credentials.NewNativeStore(file, helper).Erase(key); err != nil {
					return fmt.Errorf("forgetting the login to %s: %w", host, err)
				}
			} else if _, there := file.AuthConfigs[key]; !there {
				fmt.Fprintln(e.Stderr, "Not logged in to", host)
				return nil
			}
			delete(file.AuthConfigs, key)
			if err := file.Save(); err != nil {
				return fmt.Errorf("forgetting the login to %s: %w", host, err)
			}
			fmt.Fprintln(e.Stdout, "Removing login credentials for", host)
			return nil
		},
	}
}

// registryOf returns a registry's host, and what Docker's files call it.
func registryOf(args []string) (host, key string) {
	if len(args) == 0 {
		return dockerHub, dockerHubKey
	}
	host = credentials.ConvertToHostname(args[0])
	switch host {
	case dockerHub, "index.docker.io", "registry-1.docker.io":
		return dockerHub, dockerHubKey
	}
	return host, host
}

func (e *environment) dockerConfig() (*configfile.ConfigFile, error) {
	cfg, err := e.config()
	if err != nil {
		return nil, err
	}
	if cfg.DockerConfig == "" {
		return nil, hint.With(errors.New("finding Docker's configuration: HOME is not set"), "set DOCKER_CONFIG to a directory of your own")
	}
	file, err := dockerconfig.Load(cfg.DockerConfig)
	if err != nil {
		return nil, fmt.Errorf("reading Docker's configuration in %s: %w", cfg.DockerConfig, err)
	}
	if file.AuthConfigs == nil {
		file.AuthConfigs = map[string]types.AuthConfig{}
	}
	return file, nil
}

func helperOf(file *configfile.ConfigFile, key string) string {
	if h, ok := file.CredentialHelpers[key]; ok {
		return h
	}
	return file.CredentialsStore
}

// storeLogin does what the library's file store does, which writes its warning to the process's own stderr.
func (e *environment) storeLogin(file *configfile.ConfigFile, key, user, password string) error {
	login := types.AuthConfig{Username: user, Password: password, ServerAddress: key}
	if helper := helperOf(file, key); helper != "" {
		return credentials.NewNativeStore(file, helper).Store(login)
	}
	file.AuthConfigs[key] = login
	if err := file.Save(); err != nil {
		return err
	}
	if err := os.Chmod(file.Filename, 0o600); err != nil {
		return err
	}
	ui.Warnings(e.Stderr, []string{fmt.Sprintf("the password is stored unencrypted in %s; a credential helper avoids that, see https://docs.docker.com/go/credential-store/", file.Filename)})
	return nil
}

func (e *environment) askLogin(host, user, password string, fromStdin bool) (string, string, error) {
	if fromStdin {
		if user == "" {
			return "", "", usagef("--password-stdin needs --username")
		}
		data, err := io.ReadAll(io.LimitReader(e.Stdin, 1<<20))
		password = strings.TrimRight(string(data), "\r\n")
		if err == nil && password == "" {
			err = hint.With(fmt.Errorf("reading the password: standard input is empty: %w", errdefs.ErrInvalidArgument), "atoll login -u NAME --password-stdin <file")
		}
		return user, password, err
	}
	if user != "" && password != "" {
		return user, password, nil
	}
	fd, terminal := ui.Terminal(e.Stdin)
	if !terminal {
		return "", "", hint.With(fmt.Errorf("logging in to %s: there is no terminal to ask for name and password: %w", host, errdefs.ErrInvalidArgument), "atoll login -u NAME --password-stdin <file")
	}
	if user == "" {
		fmt.Fprintf(e.Stderr, "Username for %s: ", host)
		line, err := bufio.NewReader(e.Stdin).ReadString('\n')
		if err != nil {
			return "", "", fmt.Errorf("reading the name: %w", err)
		}
		user = strings.TrimSpace(line)
	}
	if password == "" {
		fmt.Fprint(e.Stderr, "Password: ")
		data, err := term.ReadPassword(fd)
		fmt.Fprintln(e.Stderr)
		if err != nil {
			return "", "", fmt.Errorf("reading the password: %w", err)
		}
		password = string(data)
	}
	if user == "" || password == "" {
		return "", "", fmt.Errorf("logging in to %s: name and password may not be empty: %w", host, errdefs.ErrInvalidArgument)
	}
	return user, password, nil
}
