package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/agent"
	"ambient-emulator/cni-emulator/internal/redirect"
)

// serve is the node agent, from its sockets until a signal.
type serve struct {
	zds, control, state string
	watch, match        string
	capture             string
	dns, trace          bool
	stderr              io.Writer
}

func newServe(stderr io.Writer) *cobra.Command {
	s := serve{stderr: stderr}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the node agent: ztunnels connect to it, verbs talk to it",
		Long: `serve is the node agent. It listens on one socket for ztunnels, which it tells of
pods as the real agent does (ZDS), and on another for the verbs add, del, list
and status.

It survives its own end, even kill -9: the pods come back from a file, and their
namespaces from their paths.

It needs no capability: verbs open namespaces, ztunnel enters them. With
CAP_SYS_ADMIN it can tell, after a restart, whether a path still leads to the same
namespace. To capture pods it needs CAP_SYS_ADMIN and CAP_NET_ADMIN.

With --capture a pod's traffic goes through ztunnel's listeners: the rules are in
the pod before ztunnel hears of it, and come out when ztunnel has let it go. They
stay when the agent ends.`,
		Example: `  sudo cni-emulator serve &
  sudo ztunnel-emulator --inpod-uds /run/cni-emulator/zds.sock &
  sudo ip netns add web && sudo ip -n web link set lo up
  sudo cni-emulator add web
  sudo cni-emulator list
  sudo cni-emulator serve --capture redirect
  sudo cni-emulator serve --watch /var/run/netns    # then ip netns add alone makes a pod

Exit codes:
  0  stopped by SIGINT or SIGTERM, the sockets removed; ztunnels go on serving their pods
  1  it failed; stderr says why
  2  the words of the call were wrong`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("state") {
				s.state = defaultState(s.control)
			}
			return s.run()
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&s.zds, "zds-uds", defaultPath("zds.sock"), "where ztunnels connect")
	f.StringVar(&s.control, "control-uds", defaultPath("control.sock"), "where verbs connect")
	f.StringVar(&s.watch, "watch", "", "make a pod of every namespace in this directory, such as "+netnsDir)
	f.StringVar(&s.match, "match", "", "with --watch: only of files with such names, a glob (default all but a container runtime's cni-UUID)")
	f.StringVar(&s.capture, "capture", string(redirect.None), "how pods' traffic is captured: none, redirect, or tproxy for listeners on 127.0.0.1")
	f.BoolVar(&s.dns, "dns-capture", false, "with --capture: send the pods' DNS to ztunnel, too (port 15053)")
	f.StringVar(&s.state, "state", "", "the file that remembers the pods for the agent's next start; '' for none (default beside --control-uds)")
	f.BoolVar(&s.trace, "trace-zds", false, "print each ZDS packet on stderr")
	return cmd
}

func (s *serve) run() error {
	var err error
	if s.zds, err = needPath(s.zds, "--zds-uds"); err != nil {
		return err
	}
	if s.control, err = needPath(s.control, "--control-uds"); err != nil {
		return err
	}
	if _, err := filepath.Match(s.match, ""); err != nil {
		return usageError{fmt.Errorf("--match %q: %w", s.match, err)}
	}
	if s.match != "" && s.watch == "" {
		return usageError{errors.New("--match without --watch matches nothing")}
	}
	mode, err := redirect.ParseMode(s.capture)
	if err != nil {
		return usageError{fmt.Errorf("--%w", err)}
	}
	if s.dns && mode == redirect.None {
		return usageError{errors.New("--dns-capture without --capture captures nothing")}
	}
	if err := makeRunDir(s.zds, s.control); err != nil {
		return err
	}
	cfg := agent.Config{ZDS: s.zds, Control: s.control, State: s.state, Watch: s.watch, Match: s.match, Capture: redirect.Config{Mode: mode, DNS: s.dns, IPv6: true}, Log: slog.New(slog.NewTextHandler(s.stderr, nil))}
	if s.trace {
		cfg.Trace = s.stderr
	}

	// From the first instant: a signal that comes while we start must not leave
	// the sockets' files behind.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	// stderr may be a pipe whose reader leaves; the pods are worth more than that.
	signal.Ignore(unix.SIGPIPE)

	// Not on this goroutine: it is locked to the main thread, and every wait
	// would be a switch of threads.
	served := make(chan error, 1)
	go serveAgent(ctx, cfg, served)
	return <-served
}

func serveAgent(ctx context.Context, cfg agent.Config, served chan<- error) {
	a, err := agent.New(cfg)
	if err == nil {
		err = a.Run(ctx)
	}
	served <- err
}

// defaultState returns the path of the state file of the agent with that socket:
// state.json where the socket is control.sock, and a name like the socket's
// elsewhere, so that two agents can share a directory.
func defaultState(control string) string {
	dir, name := filepath.Split(strings.TrimSuffix(control, ".sock"))
	if name == "control" {
		return dir + "state.json"
	}
	return dir + name + ".state.json"
}

// makeRunDir makes the directory of a socket that is at its default path.
func makeRunDir(sockets ...string) error {
	for _, path := range sockets {
		if path != defaultPath("zds.sock") && path != defaultPath("control.sock") {
			continue
		}
		dir, err := runDir()
		if err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%w; or name other places with --zds-uds and --control-uds", err)
		}
	}
	return nil
}
