// Package cli is the command line of ztunnel-emulator.
package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
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

// verbs are words that could be mistaken for a socket's path.
var verbs = []string{"serve", "add", "del", "list", "status", "rules", "version"}

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
	logs := new(logging)
	s := serve{stdout: stdout, stderr: stderr, logging: logs}
	z := serveZDS{stderr: stderr, logging: logs}
	root := &cobra.Command{
		Use:   "ztunnel-emulator <uds_path> | --inpod-uds PATH",
		Short: "Take pods' network namespaces from a socket and serve listeners inside them",
		Long: `ztunnel-emulator plays ztunnel, the node proxy of Istio's ambient mode.

With <uds_path> it listens on that Unix socket for network namespaces, which
cni-emulator sends. For each it enters the namespace on one thread, binds
127.0.0.1:15008, 15006 and 15001 there, comes back, prints "listeners ready" on
stdout and tells the sender. It serves any number of pods until SIGINT or
SIGTERM; a pod lives until then. It needs CAP_SYS_ADMIN: run it with sudo, or
give it that alone with
  sudo setcap cap_sys_admin+ep PATH/TO/ztunnel-emulator

With --inpod-uds it works as the real ztunnel does: it dials the node agent at
PATH (istio-cni, or cni-emulator serve) and speaks ZDS. Listeners are bound to
the wildcard address, marked and shareable with the next ztunnel. Readiness is
at :15021/healthz/ready, so each ztunnel needs a network namespace of its own
to live in. SIGTERM lets running connections end first. It needs CAP_NET_ADMIN,
too. The agent's socket is never guessed: a second ztunnel on a production
agent takes over its new pods.

With PROXY_MODE=dedicated there is no agent: it serves one workload, in the network
namespace that it is started in, and needs no capability (but CAP_NET_ADMIN for
PACKET_MARK=1337, by which rules know its own traffic).

Traffic that a pod's rules redirect (cni-emulator --capture, or rules install) is
carried on from inside the pod: outbound from 15001, inbound from 15006 with the
client's own address, DNS from 15053 to the node's resolvers. What nobody has
redirected is answered with "ok" by hand, and refused as a loop with --inpod-uds.

With --local-xds FILE there is a mesh: the file says who is who, and connections
between workloads that take tunnels go over 15008 in mutual TLS, each end proven
by a certificate of the CA (--ca-cert and --ca-key, or --ca-dir). Without a mesh
15008 answers "ok".`,
		Example: `  sudo ip netns add ns2 && sudo ip -n ns2 link set lo up
  sudo ztunnel-emulator /tmp/zt.sock &
  sudo cni-emulator /tmp/zt.sock /var/run/netns/ns2
  sudo ip netns exec ns2 ss -ntlp
  sudo ip netns exec ns2 nc -v -z localhost 15008

  sudo cni-emulator serve --capture redirect &
  sudo ztunnel-emulator --inpod-uds /run/cni-emulator/zds.sock &
  sudo cni-emulator add ns2

  sudo ztunnel-emulator --inpod-uds /run/cni-emulator/zds.sock \
    --local-xds mesh.yaml --ca-dir /run/ztunnel-emulator/ca

Environment (names and defaults are the real ztunnel's):
  LOG_FORMAT=plain                 how log lines look; --log-format beats it
  RUST_LOG=info                    the least that is logged; --log-level beats it.
                                   Of directives joined by commas those for single
                                   modules (h2=off) are passed over

Environment, except with <uds_path> (names and defaults are the real ztunnel's):
  INPOD_UDS                        the agent's socket, in place of --inpod-uds
  IPV6_ENABLED=true                bind [::], which takes IPv4 too; else 0.0.0.0
  PACKET_MARK=1337                 the mark of every socket in a pod; 0 for none
  INPOD_PORT_REUSE=true            share ports with the next ztunnel
  ENABLE_ORIG_SRC                  true: transparent sockets or fail; false: none;
                                   unset: if it may
  ISTIO_META_DNS_CAPTURE=true      serve DNS on 15053 of the pod's loopback
  KEEPALIVE_ENABLED=true, _TIME=180s, _INTERVAL=180s, _RETRIES=9
                                   of captured connections; USER_TIMEOUT_ENABLED
  PROXY_MODE=shared                dedicated: one workload and no agent; PACKET_MARK
  PROXY_WORKLOAD_INFO              is then 0, and this says who: NAMESPACE/NAME/ACCOUNT
  CONNECTION_TERMINATION_DEADLINE=5s
                                   how long connections may go on after SIGTERM
  TERMINATION_GRACE_PERIOD_SECONDS if that is unset: some seconds less than this

With a mesh:
  LOCAL_XDS_PATH, LOCAL_XDS        the file, or its text
  NODE_NAME, NETWORK               where we are; only the node's workloads are ours
  FAKE_CA=false, SECRET_TTL=24h    a CA of our own; how long certificates hold
  CRL_PATH                         a file of revocation lists, which is followed
  TLS12_ENABLED, COMPLIANCE_POLICY=pqc
  POOL_MAX_STREAMS_PER_CONNECTION=100, POOL_UNUSED_RELEASE_TIMEOUT=5m
  HTTP2_STREAM_WINDOW_SIZE, HTTP2_CONNECTION_WINDOW_SIZE, HTTP2_FRAME_SIZE
  ENABLE_RESPONSE_BAGGAGE=true, LOCALHOST_APP_TUNNEL=true, AUTHZ_POLICY_INFO_LOGGING

Exit codes:
  0  stopped by a signal, everything closed
  1  it failed, or the agent broke the protocol; stderr says why
  2  the words of the call were wrong`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 0 && ownMode():
				if flag := changed(cmd, "inpod-uds", "trace-zds"); flag != "" {
					return usageError{fmt.Errorf("PROXY_MODE=%s has no agent: what is --%s for?", os.Getenv("PROXY_MODE"), flag)}
				}
				return nil
			case len(args) == 0 && z.path != "":
				return nil
			case len(args) > 0 && cmd.Flags().Changed("inpod-uds"):
				return usageError{errors.New("either listen on <uds_path> or dial --inpod-uds, not both")}
			}
			if flag := changed(cmd, "local-xds", "ca-cert", "ca-key", "ca-dir", "resolv-conf", "trace-zds"); len(args) > 0 && flag != "" {
				return usageError{fmt.Errorf("--%s is for --inpod-uds; with <uds_path> everything is carried in the clear", flag)}
			}
			if len(args) > 0 && strings.HasPrefix(args[0], "/var/run/netns/") {
				return usageError{fmt.Errorf("%s is a place for namespaces, not for a socket; cni-emulator is the one that takes a namespace", args[0])}
			}
			if len(args) > 0 && slices.Contains(verbs, args[0]) {
				return usageError{fmt.Errorf("%s is no verb here; a socket of that name is ./%s", args[0], args[0])}
			}
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
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return z.run()
			}
			return s.run(args[0])
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	f := root.Flags()
	f.SortFlags = false
	f.StringVar(&z.path, "inpod-uds", os.Getenv("INPOD_UDS"), "dial the node agent at this `path` and speak ZDS (env INPOD_UDS)")
	f.StringVar(&z.resolvConf, "resolv-conf", "", "who resolves what pods ask for: a `file` as resolv.conf(5) (default /etc/resolv.conf)")
	z.mesh.bind(root)
	f.BoolVar(&z.trace, "trace-zds", false, "print each ZDS packet on stderr")
	f.BoolVarP(&s.explain, "explain", "v", false, "narrate each handoff on stderr")
	logs.bind(root)
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(newCompletion())
	// <uds_path> is a file.
	root.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return root
}

// changed returns the first of the flags that the call has, or "".
func changed(cmd *cobra.Command, flags ...string) string {
	i := slices.IndexFunc(flags, cmd.Flags().Changed)
	if i < 0 {
		return ""
	}
	return flags[i]
}

// newCompletion prints a shell's completion script. cobra has such a command of
// its own, but only beside other verbs, and here are none.
func newCompletion() *cobra.Command {
	return &cobra.Command{
		Use:       "completion bash|zsh|fish",
		Short:     "Print the completion script for a shell",
		Example:   "  source <(ztunnel-emulator completion bash)",
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)(cmd, args); err != nil {
				return usageError{fmt.Errorf("which shell? ztunnel-emulator completion bash, zsh or fish")}
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
