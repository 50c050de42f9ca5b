package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
)

const (
	defaultTimeout = 10 * time.Second
	netnsDir       = "/var/run/netns" // where ip-netns(8) keeps names
)

// checkWords checks the words of a call without a verb.
func checkWords(args []string) error {
	switch {
	case len(args) == 0:
		return usageError{errors.New("what is to be handed over? cni-emulator <uds_path> <netns_path>")}
	case !isSocketPath(args[0]):
		return usageError{fmt.Errorf("unknown verb %q (a socket path has a / in it: ./%s)", args[0], args[0])}
	case len(args) == 1:
		return usageError{fmt.Errorf("which namespace is to be handed over? cni-emulator %s <netns_path>", args[0])}
	case args[1] == "":
		return usageError{errors.New("the namespace's path is empty")}
	case len(args) > 2:
		return usageError{fmt.Errorf("one namespace at a time; what is %q?", args[2])}
	}
	return nil
}

// isSocketPath tells a socket path from a mistyped verb.
func isSocketPath(word string) bool {
	if strings.Contains(word, "/") {
		return true
	}
	fi, err := os.Stat(word)
	return err == nil && fi.Mode().Type() == fs.ModeSocket
}

// handover is the seed's mode: one namespace over one connection.
type handover struct {
	timeout time.Duration
	explain bool
	stderr  io.Writer
}

// run hands the namespace at netnsPath to whoever listens at udsPath, and
// returns nil when the listeners are confirmed.
func (h *handover) run(ctx context.Context, udsPath, netnsPath string) error {
	if h.timeout < 0 {
		return usageError{fmt.Errorf("--timeout %v: it can't be negative", h.timeout)}
	}
	step := h.narrator()

	ns, err := netns.Open(netnsPath)
	if err != nil {
		return fmt.Errorf("open network namespace %w%s", plain(err), netnsAdvice(netnsPath, err))
	}
	defer ns.Close()
	step("open %s: fd %d here is %v", netnsPath, ns.FD(), ns.ID())

	wait := h.timeout
	if wait == 0 {
		wait = defaultTimeout // for connect; the answer is not waited for
	}
	deadline := time.Now().Add(wait)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	var conn *net.UnixConn
	var peer uds.Peer
	if err = soon(ctx, udsPath, func() error {
		conn, peer, err = uds.Dial(ctx, "unix", udsPath)
		return err
	}); err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(deadline)
	step("connect to %s: pid %d, uid %d listens there (SO_PEERCRED)", udsPath, peer.PID, peer.UID)

	sendErr := handoff.Send(conn, ns.FD())
	if sendErr == nil {
		step("sendmsg: byte %#02x, and fd %d in SCM_RIGHTS; the receiver gets the same open file under a number of its own", handoff.Add, ns.FD())
		if h.timeout == 0 {
			step("not waiting for the answer (--timeout 0)")
			return nil
		}
	}
	// A receiver that refuses before it reads has closed already, but its answer
	// is there to be read.
	err = handoff.ReadReply(conn)
	switch {
	case err == nil:
		step("read: byte %#02x, the listeners are ready in %v", handoff.Ready, ns.ID())
		return nil
	case sendErr != nil && (errors.Is(err, handoff.ErrNotConfirmed) || errors.Is(err, handoff.ErrNotTaken)):
		err = fmt.Errorf("%w; is it a ztunnel-emulator that listens there?", sendErr)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("%w: no answer within %v; look in the pod with ss -ntlp", handoff.ErrNotConfirmed, h.timeout)
	case errors.Is(err, handoff.ErrNotConfirmed):
		err = fmt.Errorf("%w: the receiver closed without an answer; look in the pod with ss -ntlp", handoff.ErrNotConfirmed)
	}
	return fmt.Errorf("hand %s (%v) to %s: %w", netnsPath, ns.ID(), udsPath, err)
}

// narrator returns a function that prints one line a step, with the time since
// the last one, or nothing unless asked to explain.
func (h *handover) narrator() func(format string, args ...any) {
	if !h.explain {
		return func(string, ...any) {}
	}
	last := time.Now()
	return func(format string, args ...any) {
		took := time.Since(last)
		fmt.Fprintf(h.stderr, "cni-emulator [thread %d] %s (%d µs)\n", unix.Gettid(), fmt.Sprintf(format, args...), took.Microseconds())
		last = time.Now()
	}
}

// plain drops the operation from an error that we name ourselves.
func plain(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) && pe.Op == "open" {
		return fmt.Errorf("%s: %w", pe.Path, pe.Err)
	}
	return err
}

// netnsAdvice says what to try when a namespace can't be opened.
func netnsAdvice(path string, err error) string {
	name := filepath.Base(path)
	named := filepath.Join(netnsDir, name)
	switch {
	case errors.Is(err, unix.ENXIO): // open(2) of a socket
		return "; this is a socket: <uds_path> comes first, then <netns_path>"
	case errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(path, "/proc/"):
		return "; is there such a process?"
	case errors.Is(err, fs.ErrNotExist):
		if _, statErr := os.Stat(named); statErr == nil && path == name {
			return "; did you mean " + named + "?"
		}
		if path == named {
			return "; `ip netns list` shows what there is, `sudo ip netns add " + name + "` makes it"
		}
		return "; `ip netns list` shows those in " + netnsDir
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return "; run with sudo"
	case errors.Is(err, netns.ErrNotNetNS):
		return "; give the path of one, such as " + netnsDir + "/NAME or /proc/PID/ns/net"
	}
	return ""
}
