package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newRootCmd(e *environment) *cobra.Command {
	root := newGroup("atoll", "Virtual machines with the Docker workflow", ``)
	root.Long = `Atoll builds images from Dockerfiles and runs each as a small virtual machine.

State is kept in ATOLL_HOME (/var/lib/atoll for root, $XDG_DATA_HOME/atoll or
~/.local/share/atoll for others). The daemon that owns it is started when a
command needs it. ATOLL_HOST or --host choose another daemon.`
	root.Example = `  atoll base build debian:bookworm
  atoll build -t hello examples/hello
  atoll run -d --name hello -p 8080:80 hello`
	root.SilenceErrors, root.SilenceUsage = true, true
	root.Version = e.Version.Version
	root.SetVersionTemplate("atoll {{.Version}}\n")
	root.PersistentFlags().StringVarP(&e.host, "host", "H", "", "address of the daemon, such as unix:///run/atoll.sock")
	root.SetIn(e.Stdin)
	root.SetOut(e.Stdout)
	root.SetErr(e.Stderr)

	const machines, images, other = "machines", "images", "other"
	root.AddGroup(&cobra.Group{ID: machines, Title: "Machines:"}, &cobra.Group{ID: images, Title: "Images, kernels, bases:"}, &cobra.Group{ID: other, Title: "Other:"})
	root.SetHelpCommandGroupID(other)
	root.SetCompletionCommandGroupID(other)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(machines,
		newRunCmd(e), newCreateCmd(e), newStartCmd(e), newStopCmd(e), newRestartCmd(e), newKillCmd(e), newRmCmd(e), newWaitCmd(e),
		newPsCmd(e), newInspectCmd(e), newLogsCmd(e), newPortCmd(e), newExecCmd(e), newCpCmd(e), newAttachCmd(e), newConsoleCmd(e))
	add(images,
		newBuildCmd(e), newBuilderCmd(e), newImageCmd(e), newImagesCmd(e), newPullCmd(e), newPushCmd(e), newTagCmd(e), newRmiCmd(e),
		newSaveCmd(e), newLoadCmd(e), newImportCmd(e), newHistoryCmd(e), newLoginCmd(e), newLogoutCmd(e), newBaseCmd(e), newKernelCmd(e))
	add(other, newProfileCmd(e), newEventsCmd(e), newDoctorCmd(e), newSystemCmd(e), newVersionCmd(e))
	root.AddCommand(e.Extra...)
	e.markRunning(root)
	return root
}

// markRunning lets finish tell a command line that was not understood from a command that failed.
func (e *environment) markRunning(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		e.markRunning(c)
	}
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			e.running = true
			return run(cmd, args)
		}
	}
	cmd.DisableFlagsInUseLine = true
}

// newGroup returns a command that only holds others.
func newGroup(use, short, example string, cmds ...*cobra.Command) *cobra.Command {
	group := &cobra.Command{
		Use:                        use,
		Short:                      short,
		Example:                    example,
		Args:                       cobra.ArbitraryArgs,
		SuggestionsMinimumDistance: 2,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			text := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				text += "; did you mean " + strings.Join(s, " or ") + "?"
			}
			return usagef("%s", text)
		},
	}
	group.AddCommand(cmds...)
	return group
}
