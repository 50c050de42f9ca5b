// Package cli is the command line of ztunnel-emulator.
package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// version is a constant because `go build ztunnel-emulator.go` records none.
const version = "0.1.0"

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// usageError is an error in the words of the call, not in what it did.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// errHelp says that help has been printed in place of an error.
var errHelp = errors.New("help")

// Main runs the command line and returns the exit code.
func Main(args []string, stdout, stderr io.Writer) int {
	root := newRoot(stdout, stderr)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)

	err := root.Execute()
	if err == nil {
		return exitDone
	}
	if errors.Is(err, errHelp) {
		return exitUsage
	}
	fmt.Fprintf(stderr, "ztunnel-emulator: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintln(stderr, "See `ztunnel-emulator --help`.")
		return exitUsage
	}
	return exitFailed
}

func newRoot(stdout, stderr io.Writer) *cobra.Command {
	s := serve{stdout: stdout, stderr: stderr}
	root := &cobra.Command{
		Use:   "ztunnel-emulator <uds_path>",
		Short: "Take pods' network namespaces from a socket and serve listeners inside them",
		Long: `ztunnel-emulator plays ztunnel, the node proxy of Istio's ambient mode.

It listens on the Unix socket <uds_path> for network namespaces, which
cni-emulator sends. For each it enters the namespace on one thread, binds
127.0.0.1:15008, 15006 and 15001 there, comes back, prints "listeners ready" on
stdout and tells the sender. It serves any number of pods until SIGINT or
SIGTERM; a pod lives until then.

A connection to one of the ports is answered with "ok" and closed.

It needs CAP_SYS_ADMIN: run it with sudo, or give it that alone with
  sudo setcap cap_sys_admin+ep ./ztunnel-emulator`,
		Example: `  sudo ip netns add ns2 && sudo ip -n ns2 link set lo up
  sudo ztunnel-emulator /tmp/zt.sock &
  sudo cni-emulator /tmp/zt.sock /var/run/netns/ns2
  sudo ip netns exec ns2 ss -ntlp
  sudo ip netns exec ns2 nc -v -z localhost 15008

Exit codes:
  0  stopped by a signal, everything closed
  1  it failed; stderr says why
  2  the words of the call were wrong`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			switch len(args) {
			case 0:
				cmd.SetOut(stderr)
				cmd.Help()
				return errHelp
			case 1:
				return nil
			}
			return usageError{fmt.Errorf("one socket path, please; what is %q?", args[1])}
		},
		RunE: func(cmd *cobra.Command, args []string) error { return s.run(args[0]) },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	root.Flags().BoolVarP(&s.explain, "explain", "v", false, "narrate each handoff on stderr")
	root.AddCommand(newCompletion())
	root.SetHelpCommand(&cobra.Command{Use: "no-help", Hidden: true}) // --help is enough
	root.CompletionOptions.DisableDefaultCmd = true
	return root
}

// newCompletion prints a shell's completion script.
func newCompletion() *cobra.Command {
	return &cobra.Command{
		Use:       "completion bash|zsh|fish",
		Short:     "Print the completion script for a shell",
		Example:   "  source <(ztunnel-emulator completion bash)",
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			default:
				return root.GenFishCompletion(out, true)
			}
		},
	}
}
