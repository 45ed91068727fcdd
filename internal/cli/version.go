package cli

import (
	"errors"
	"fmt"
	"io"
	"runtime"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	atollv1 "github.com/atollvm/atoll/api/atoll/v1"
	"github.com/atollvm/atoll/internal/cli/ui"
)

func newVersionCmd(e *environment) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "version [OPTIONS]",
		Short: "Show the versions of this command and of the daemon",
		Example: `  atoll version
  atoll version --format '{{.Client.Version}} {{.Server.Version}}'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := ui.CheckFormat(format); err != nil {
				return usageError{err}
			}
			v := versionView{Client: buildView{e.Version.Version, e.Version.Commit, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}}
			c, err := e.connect(cmd.Context())
			if err == nil {
				var res *connect.Response[atollv1.VersionResponse]
				if res, err = c.System.Version(cmd.Context(), connect.NewRequest(&atollv1.VersionRequest{})); err == nil {
					m := res.Msg
					v.Server = &serverView{buildView{m.GetVersion(), m.GetCommit(), m.GetGoVersion(), m.GetPlatform()}, m.GetPid(), m.GetHome()}
				}
			}
			// The client's part is worth knowing also, and most, when the daemon does not answer.
			if format == "" || format == "table" {
				v.print(e.Stdout)
				return err
			}
			if err != nil {
				v.Server = &serverView{}
			}
			return errors.Join(ui.Each(e.Stdout, format, []versionView{v}), err)
		},
	}
	addFormat(cmd, &format, "table", "json")
	return cmd
}

func (v versionView) print(w io.Writer) {
	part := func(title string, b buildView) {
		fmt.Fprintf(w, "%s:\n Version:    %s\n Commit:     %s\n Go version: %s\n Platform:   %s\n", title, b.Version, b.Commit, b.GoVersion, b.Platform)
	}
	part("Client", v.Client)
	if s := v.Server; s != nil {
		part("Server", s.buildView)
		fmt.Fprintf(w, " PID:        %d\n Home:       %s\n", s.PID, s.Home)
	}
}
