package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/inpod"
)

// serve is the seed's mode: listen, take pods, until a signal.
type serve struct {
	stdout, stderr io.Writer
	explain        bool
	logging        *logging
}

func (s *serve) run(path string) error {
	log, err := s.logging.logger(s.stderr)
	if err != nil {
		return err
	}
	inPod := log.With(accesslog.Target, targetInPod)

	// From the first instant: a signal that comes while we start must not leave
	// the socket's file behind.
	ctx, stop := untilSignal()
	defer stop()
	if err := netns.Probe(); err != nil {
		return capabilityError(err)
	}
	pods, err := inpod.NewPods(inPod)
	if err != nil {
		return err
	}
	l, err := uds.Listen("unix", path)
	if err != nil {
		return errors.Join(err, pods.Close())
	}
	log.Info("listening for pods", "socket", path, "pid", os.Getpid(), "version", version)

	server := &inpod.Server{
		Pods: pods,
		Log:  inPod,
		Ready: func() {
			if _, err := fmt.Fprintln(s.stdout, "listeners ready"); err != nil {
				log.Warn("print on stdout", "error", err)
			}
		},
		Report: func(h inpod.Handoff) {
			if s.explain {
				explain(s.stderr, path, h)
			}
			report(inPod, h)
		},
	}
	// Not on this goroutine: it is locked to the main thread, and every wait
	// would be a switch of threads.
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	err = <-served

	n := pods.Len()
	err = errors.Join(err, l.Close(), pods.Close())
	log.Info("stopped", "pods", n)
	return err
}

// untilSignal returns a context that the first signal ends. A second one ends the
// process at once, whatever it is doing.
func untilSignal() (context.Context, context.CancelFunc) {
	signals := []os.Signal{unix.SIGINT, unix.SIGTERM}
	if !signal.Ignored(unix.SIGHUP) { // nohup(1) has it ignored
		signals = append(signals, unix.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	context.AfterFunc(ctx, stop)
	// stdout or stderr may be a pipe whose reader leaves; the pods' listeners are
	// worth more than that. Writing then fails with EPIPE.
	signal.Ignore(unix.SIGPIPE)
	return ctx, stop
}

// report logs what became of one handoff.
func report(log *slog.Logger, h inpod.Handoff) {
	args := make([]any, 0, 12)
	if h.NetNS != (netns.ID{}) {
		args = append(args, "netns", h.NetNS)
	}
	args = append(args, "peer_pid", h.Peer.PID, "peer_uid", h.Peer.UID, "duration", h.Duration)
	switch {
	case errors.Is(h.Err, handoff.ErrSilent):
		// Another starter that looks whether we live does that, too.
		log.Info("peer left without a word", args...)
		return
	case h.Err != nil:
		log.Warn("pod refused", append(args, "error", h.Err)...)
		return
	case h.Added.New:
		log.Info("pod served", args...)
	default:
		log.Info("pod served already", args...)
	}
	if h.Added.LoopDown {
		log.Warn(inpod.LoopDownWarning(h.NetNS, h.Added.NetNSFD), "netns", h.NetNS)
	}
	if h.ReplyErr != nil && !errors.Is(h.ReplyErr, unix.EPIPE) { // EPIPE: the seed's sender, which does not wait
		log.Warn("the sender was not told", append(args, "error", h.ReplyErr)...)
	}
}

// capabilityError words a failed probe.
func capabilityError(err error) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	return fmt.Errorf("entering a pod's network namespace needs CAP_SYS_ADMIN, which this process lacks: run it with sudo, or once: sudo setcap cap_sys_admin+ep %s", executable())
}

// executable is our own path, for advice.
func executable() string {
	exe, err := os.Executable()
	if err != nil {
		return "./ztunnel-emulator"
	}
	return exe
}
