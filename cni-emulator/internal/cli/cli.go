// Package cli is the command line of cni-emulator: one file a verb.
package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"ambient-emulator/internal/handoff"
)

// version is a constant because `go build cni-emulator.go` records none.
const version = "0.1.0"

// Exit codes, the same for every verb.
const (
	exitDone         = 0
	exitFailed       = 1
	exitUsage        = 2
	exitNotConfirmed = 3
)

// usageError is an error in the words of the call, not in what it did.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// Main runs the command line and returns the exit code.
func Main(args []string, stdout, stderr io.Writer) int {
	root := newRoot(stderr)
	if len(args) == 0 || !isSocketPath(args[0]) { // else it is no verb, though it be called like one
		root.AddCommand(newServe(stderr), newAdd(), newDel(), newList(), newStatus(), newRules(), newCompletion())
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)

	cmd, err := root.ExecuteC()
	if err == nil {
		return exitDone
	}
	fmt.Fprintf(stderr, "cni-emulator: %s\n", oneLine(err))
	var usage usageError
	switch {
	case errors.As(err, &usage):
		fmt.Fprintf(stderr, "See `%s --help`.\n", cmd.CommandPath())
		return exitUsage
	case errors.Is(err, handoff.ErrNotConfirmed):
		return exitNotConfirmed
	}
	return exitFailed
}

// oneLine makes sure that an error is one line, whatever it wraps.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// newRoot returns the command without a verb: the seed's mode.
func newRoot(stderr io.Writer) *cobra.Command {
	var h handover
	root := &cobra.Command{
		Use:   "cni-emulator <uds_path> <netns_path>",
		Short: "Hand a pod's network namespace to a ztunnel",
		Long: `cni-emulator plays istio-cni, the node agent of Istio's ambient mode.

It opens the network namespace at <netns_path> and passes its file descriptor
over the Unix socket at <uds_path>, where ztunnel-emulator listens. ztunnel
enters the namespace, binds 127.0.0.1:15008, 15006 and 15001 there and comes
back; then this command ends. It prints nothing when all went well.

It redirects nothing. ` + "`cni-emulator rules install --capture tproxy`" + ` sends the pod's
traffic through these listeners.`,
		Example: `  sudo ip netns add ns2 && sudo ip -n ns2 link set lo up
  sudo ztunnel-emulator /tmp/zt.sock &
  sudo cni-emulator /tmp/zt.sock /var/run/netns/ns2
  sudo ip netns exec ns2 ss -ntlp

Exit codes:
  0  the listeners are ready (with --timeout 0: the namespace was sent)
  1  it failed or was refused; stderr says why
  2  the words of the call were wrong
  3  delivered, not confirmed: no answer came`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			return checkWords(args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			h.stderr = stderr
			return h.run(cmd.Context(), args[0], args[1])
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	f := root.Flags()
	f.SortFlags = false
	f.DurationVar(&h.timeout, "timeout", defaultTimeout, "how long to wait for the answer; 0 does not wait")
	f.BoolVarP(&h.explain, "explain", "v", false, "narrate each step on stderr")
	// The two paths are files.
	root.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault
	}
	root.CompletionOptions.DisableDefaultCmd = true // ours tells a wrong shell's name from a right one
	return root
}

// newCompletion prints a shell's completion script.
func newCompletion() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:       "completion bash|zsh|fish",
		Short:     "Print the completion script for a shell",
		Example:   "  source <(cni-emulator completion bash)",
		ValidArgs: shells,
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
