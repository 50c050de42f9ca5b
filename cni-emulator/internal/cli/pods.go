package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/cni-emulator/internal/redirect"
	"ambient-emulator/internal/netns"
)

// podFlags are the flags of add and del.
type podFlags struct {
	daemonFlags
	pod     control.PodID
	noWait  bool
	timeout time.Duration
}

func (p *podFlags) register(cmd *cobra.Command, uid string) {
	f := cmd.Flags()
	f.StringVar(&p.pod.Namespace, "namespace", "default", "the pod's Kubernetes namespace")
	f.StringVar(&p.pod.UID, "uid", "", uid)
	f.BoolVar(&p.noWait, "no-wait", false, "do not wait for ztunnel's answer")
	f.DurationVar(&p.timeout, "timeout", defaultTimeout, "how long to wait for it; 0 does not wait")
	p.daemonFlags.register(cmd)
}

// wait returns how long to wait for ztunnel.
func (p *podFlags) wait() (time.Duration, error) {
	switch {
	case p.timeout < 0:
		return 0, usageError{fmt.Errorf("--timeout %v: it can't be negative", p.timeout)}
	case p.noWait:
		return 0, nil
	}
	return p.timeout, nil
}

// onePod checks the words of add and del.
func onePod(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) > 1:
		return usageError{fmt.Errorf("one pod at a time; what is %q?", args[1])}
	case len(args) == 1 && args[0] == "":
		return usageError{errors.New("the pod's name is empty")}
	case len(args) == 0 && cmd.Name() == "del" && cmd.Flags().Changed("uid"):
		return nil
	case len(args) == 0:
		return usageError{fmt.Errorf("which pod? cni-emulator %s", cmd.Use)}
	}
	return nil
}

func newAdd() *cobra.Command {
	var p podFlags
	var path string
	var dns bool
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Make a network namespace a pod of the running agent",
		Long: `add makes a network namespace a pod: it opens the namespace and passes its
descriptor to the agent, which keeps it and sends it to the newest ztunnel. It
prints nothing when ztunnel has the listeners ready, but a note on stderr if the pod
has open connections that its capture will reset.

With no ztunnel connected the agent keeps the pod for the next one, and add
waits for that until --timeout. The same add again is a success that changes
nothing; with another namespace, or another name or service account, it replaces
the pod. A pod that serve --watch has made is yours from then on: its names are
those you say, and it stays until del.

With a mesh (ztunnel-emulator --local-xds) name, namespace and service account are
those of a workload in the file.`,
		Example: `  sudo ip netns add web && sudo ip -n web link set lo up
  sudo cni-emulator add web
  sudo cni-emulator add web --netns /proc/1234/ns/net --namespace prod --service-account shop

Exit codes:
  0  ztunnel serves the pod (with --no-wait: the agent has it)
  1  it failed; if ztunnel said no, stderr has its words, and the agent keeps the pod
  2  the words of the call were wrong
  3  delivered, not confirmed: no answer within --timeout; the agent keeps the pod`,
		Args:              onePod,
		ValidArgsFunction: completeNetNS,
		RunE: func(cmd *cobra.Command, args []string) error {
			p.pod.Name = args[0]
			if strings.Contains(p.pod.Name, "/") {
				return usageError{fmt.Errorf("%s: a pod's name has no / in it; the path of its namespace is for --netns", p.pod.Name)}
			}
			if cmd.Flags().Changed("dns-capture") {
				p.pod.DNSCapture = strconv.FormatBool(dns)
			}
			return p.add(cmd, path)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&path, "netns", "", "path of the network namespace (default "+netnsDir+"/NAME)")
	f.StringVar(&p.pod.ServiceAccount, "service-account", "default", "the pod's service account")
	f.StringVar(&p.pod.Capture, "capture", "", "how its traffic is captured: none, redirect or tproxy (default: as the agent does)")
	f.BoolVar(&dns, "dns-capture", false, "send its DNS to ztunnel, too (default: as the agent does)")
	p.register(cmd, "the pod's uid (default: follows from namespace and name)")
	return cmd
}

// add opens the namespace and passes it on.
func (p *podFlags) add(cmd *cobra.Command, path string) error {
	wait, err := p.wait()
	if err != nil {
		return err
	}
	if p.pod.Capture != "" {
		if _, err := redirect.ParseMode(p.pod.Capture); err != nil {
			return usageError{fmt.Errorf("--%w", err)}
		}
	}
	if path == "" {
		path = filepath.Join(netnsDir, p.pod.Name)
	}
	if p.pod.UID == "" {
		p.pod.UID = control.DefaultUID(p.pod.Namespace, p.pod.Name)
	}
	ns, err := netns.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace %w%s", plain(err), netnsAdvice(path, err))
	}
	defer ns.Close()
	// The agent may run elsewhere, and remembers the path for its own next start.
	if p.pod.Path, err = filepath.Abs(path); err != nil {
		return err
	}
	note := func(r control.Reply) {
		fmt.Fprintf(cmd.ErrOrStderr(), "cni-emulator: add %s: %s\n", p.pod.Name, printable(r.Note))
	}
	err = soon(cmd.Context(), p.control, func() error {
		return p.call(cmd.Context(), control.Request{Verb: control.Add, Pod: p.pod, Wait: wait}, ns.FD(), note)
	})
	if err != nil {
		return fmt.Errorf("add %s (%s, %v): %w", p.pod.Name, path, ns.ID(), err)
	}
	return nil
}

func newDel() *cobra.Command {
	var p podFlags
	cmd := &cobra.Command{
		Use:   "del NAME | --uid UID",
		Short: "Remove a pod from the running agent",
		Long: `del makes the agent forget a pod and close its namespace, and waits until every
connected ztunnel has answered. The namespace itself stays: remove it with
ip netns delete. It prints nothing when all went well.`,
		Example: `  sudo cni-emulator del web
  sudo cni-emulator del --uid 7d1a0fb4-6a45-5d0c-9d7f-2d0f7dd1c1a5

Exit codes:
  0  no ztunnel serves the pod any more (with --no-wait: the agent has forgotten it)
  1  it failed; stderr says why
  2  the words of the call were wrong
  3  delivered, not confirmed: a ztunnel has not answered within --timeout, or the
     agent has dropped it because it hung; it may still serve the pod`,
		Args:              onePod,
		ValidArgsFunction: p.completePod,
		RunE: func(cmd *cobra.Command, args []string) error {
			wait, err := p.wait()
			if err != nil {
				return err
			}
			what := "uid " + p.pod.UID
			if len(args) == 1 {
				p.pod.Name, what = args[0], args[0]
			}
			if err := p.ask(cmd.Context(), control.Request{Verb: control.Del, Pod: p.pod, Wait: wait}, func(control.Reply) {}); err != nil {
				return fmt.Errorf("del %s: %w", what, err)
			}
			return nil
		},
	}
	cmd.Flags().SortFlags = false
	p.register(cmd, "the pod's uid, in place of its name")
	return cmd
}

// completeNetNS completes the names that ip-netns(8) knows.
func completeNetNS(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	entries, _ := os.ReadDir(netnsDir)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completePod completes the names of the agent's pods.
func (p *podFlags) completePod(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var names []string
	p.ask(ctx, control.Request{Verb: control.List}, func(r control.Reply) {
		if r.Pod != nil && r.Pod.Namespace == p.pod.Namespace {
			names = append(names, r.Pod.Name)
		}
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}
