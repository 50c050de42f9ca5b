package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"ambient-emulator/cni-emulator/internal/redirect"
	"ambient-emulator/internal/netns"
)

// newRules is for the rules of a pod alone, without an agent and a ztunnel.
func newRules() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rules install|show|remove --netns PATH",
		Short: "Install, show or remove the rules that capture a pod's traffic",
		Long: `rules works on one pod alone, with no agent: it installs the rules that send the
pod's traffic through ztunnel's listeners, shows them, or removes them. It
programs the kernel over netlink; there need be no nft or iptables here.

Each needs CAP_SYS_ADMIN to enter the pod and CAP_NET_ADMIN. An agent that has
captured the pod does not notice: list goes on to say what it was told, and the
same add again puts its rules back.`,
		Example: `  sudo ip netns add web && sudo ip -n web link set lo up
  sudo cni-emulator rules install --netns /var/run/netns/web
  sudo cni-emulator rules show --netns /var/run/netns/web
  sudo cni-emulator rules remove --netns /var/run/netns/web`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("what is %q? It is install, show or remove", args[0])}
			}
			return usageError{errors.New("what is to be done with the rules? It is install, show or remove")}
		},
		RunE: func(*cobra.Command, []string) error { return nil },
	}
	cmd.AddCommand(newRulesInstall(), newRulesShow(), newRulesRemove())
	return cmd
}

// rulesNetNS is the flag that all of them have.
type rulesNetNS struct{ path string }

func (r *rulesNetNS) register(cmd *cobra.Command) {
	cmd.Flags().SortFlags = false
	cmd.Flags().StringVar(&r.path, "netns", "", "path of the pod's network namespace")
}

// in opens the namespace for the time of do.
func (r *rulesNetNS) in(do func(*netns.NS) error) error {
	if r.path == "" {
		return usageError{errors.New("which pod? Name its network namespace with --netns PATH")}
	}
	ns, err := netns.Open(r.path)
	if err != nil {
		return fmt.Errorf("open network namespace %w%s", plain(err), netnsAdvice(r.path, err))
	}
	defer ns.Close()
	// A typing error must not capture the node's own traffic.
	for _, host := range []string{"/proc/self/ns/net", "/proc/1/ns/net"} {
		home, err := netns.Open(host)
		if err != nil {
			continue // not ours to look at: then it is not ours to change, either
		}
		id := home.ID()
		home.Close()
		if id == ns.ID() {
			return fmt.Errorf("%s (%v) is the host's network namespace, not a pod's", r.path, id)
		}
	}
	return do(ns)
}

func newRulesInstall() *cobra.Command {
	var n rulesNetNS
	var mode string
	var c redirect.Config
	cmd := &cobra.Command{
		Use:   "install --netns PATH",
		Short: "Capture a pod's traffic",
		Long: `install captures a pod's traffic, or captures it anew in another way. It prints
nothing when all went well; the same again changes nothing. If it fails the pod
is as it was before.

Which way depends on where ztunnel listens in the pod:
  redirect  on the wildcard address: ztunnel-emulator --inpod-uds, and the real one
  tproxy    on 127.0.0.1, as ztunnel-emulator <uds_path> does, or anywhere; the
            listeners are transparent, for which ztunnel needs CAP_NET_ADMIN
It may be done before the pod is handed over or after. Until ztunnel listens there
no TCP gets in or out. What listens there already and would not be found is a
reason to refuse; before the handoff nobody can tell.`,
		Example: `  sudo cni-emulator rules install --netns /var/run/netns/web
  sudo cni-emulator rules install --netns /var/run/netns/web --capture tproxy --dns-capture

  sudo ztunnel-emulator /tmp/zt.sock &
  sudo cni-emulator rules install --capture tproxy --netns /var/run/netns/ns2
  sudo cni-emulator /tmp/zt.sock /var/run/netns/ns2

Exit codes:
  0  the pod's traffic is captured
  1  it failed; stderr says why, and the pod is as it was
  2  the words of the call were wrong`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.Mode = redirect.Mode(mode)
			if err := c.Check(); err != nil {
				return usageError{fmt.Errorf("--%w", err)}
			}
			return n.in(func(ns *netns.NS) error {
				report, err := redirect.Install(ns, c)
				if err == nil && report.Open > 0 {
					fmt.Fprintf(cmd.ErrOrStderr(), "cni-emulator: rules install %s: %s\n", n.path, redirect.WillReset(report.Open))
				}
				if errors.Is(err, redirect.ErrLoDown) {
					err = fmt.Errorf("%w: %s", err, redirect.LoUp(n.path))
				}
				return err
			})
		},
	}
	n.register(cmd)
	f := cmd.Flags()
	f.StringVar(&mode, "capture", string(redirect.Redirect), "how: redirect, or tproxy for listeners on 127.0.0.1")
	f.BoolVar(&c.DNS, "dns-capture", false, "send DNS to ztunnel, too (port 15053)")
	f.BoolVar(&c.IPv6, "ipv6", true, "capture IPv6 as IPv4; =false leaves it alone")
	f.BoolVar(&c.BypassInbound, "bypass-inbound-capture", false, "do not capture plaintext that comes in (an ingress gateway)")
	f.StringSliceVar(&c.VirtualInterfaces, "reroute-virtual-interfaces", nil, "interfaces in the pod whose guests' TCP is outbound traffic, separated by commas")
	return cmd
}

func newRulesShow() *cobra.Command {
	var n rulesNetNS
	cmd := &cobra.Command{
		Use:   "show --netns PATH",
		Short: "Print a pod's rules in nft syntax, with counters, each with why it exists",
		Example: `  sudo cni-emulator rules show --netns /var/run/netns/web

Exit codes:
  0  printed, also if there are none
  1  it failed; stderr says why
  2  the words of the call were wrong`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return n.in(func(ns *netns.NS) error {
				text, err := redirect.Show(ns)
				if err != nil {
					return err
				}
				_, err = fmt.Fprint(cmd.OutOrStdout(), text)
				return err
			})
		},
	}
	n.register(cmd)
	return cmd
}

func newRulesRemove() *cobra.Command {
	var n rulesNetNS
	cmd := &cobra.Command{
		Use:   "remove --netns PATH",
		Short: "Leave a pod as it was before install",
		Long: `remove takes out what install has put into the pod, and nothing else. Where there
is nothing it does nothing. It prints nothing when all went well.`,
		Example: `  sudo cni-emulator rules remove --netns /var/run/netns/web

Exit codes:
  0  nothing of install's is in the pod any more; somebody else's rules stay
  1  it failed; stderr says why
  2  the words of the call were wrong`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(*cobra.Command, []string) error { return n.in(redirect.Remove) },
	}
	n.register(cmd)
	return cmd
}
