package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/zds"
)

// op is one message to one ztunnel.
type op struct {
	what  string // add, keep, del or snapshot
	uid   string
	req   *zds.WorkloadRequest
	pod   *pod           // of an add or a keep
	netns *handle        // of an add: the op's own reference
	done  chan<- Outcome // of a del; has room
	first bool           // it is part of the snapshot
}

func (o *op) String() string {
	if o.uid == "" {
		return o.what
	}
	return fmt.Sprintf("%s %q", o.what, o.uid)
}

// addOp returns what makes p known: an add with its namespace, or a keep when
// that is not at hand. The caller holds the lock.
func (a *Agent) addOp(p *pod) *op {
	if p.netns == nil {
		return &op{what: "keep", uid: p.UID, req: zds.Keep(p.UID), pod: p}
	}
	return &op{what: "add", uid: p.UID, req: addRequest(p.PodID), pod: p, netns: p.netns.hold()}
}

// push queues o for z. The caller holds the lock.
func (a *Agent) push(z *ztunnel, o *op) {
	z.queue = append(z.queue, o)
	if len(z.queue) > maxBehind+len(a.pods) {
		z.dropped = ErrTooFar
	}
	if z.idle || z.dropped != nil {
		z.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// converse sends what is queued, message by message, until z is gone or must go.
func (a *Agent) converse(z *ztunnel) error {
	for {
		o, err := a.next(z)
		if err != nil {
			return err
		}
		nack, err := a.ask(z, o)
		a.answered(z, o, nack, err)
		if err != nil {
			return err
		}
	}
}

// next waits for the next message to send. Meanwhile it reads, where nothing may
// come but the end: so an idle ztunnel that goes is noticed at once. (The real
// agent looks every five seconds.)
func (a *Agent) next(z *ztunnel) (*op, error) {
	for {
		a.mu.Lock()
		z.idle = false
		if z.dropped != nil {
			a.mu.Unlock()
			return nil, z.dropped
		}
		if len(z.queue) > 0 {
			o := z.queue[0]
			z.queue[0] = nil
			z.queue = z.queue[1:]
			a.mu.Unlock()
			return o, nil
		}
		z.idle = true
		z.conn.SetReadDeadline(time.Time{})
		a.mu.Unlock()

		switch _, err := z.conn.ReadResponse(); {
		case errors.Is(err, os.ErrDeadlineExceeded): // somebody has queued something
		case err == nil:
			return nil, ErrUnasked
		default:
			return nil, err
		}
	}
}

// ask sends one message and waits for its answer.
func (a *Agent) ask(z *ztunnel, o *op) (nack string, err error) {
	z.conn.SetDeadline(time.Now().Add(a.timeout))
	// What lies there already can't be the answer to what we have not sent yet.
	if waiting, err := readable(z.conn.UnixConn); err != nil {
		return "", err
	} else if waiting {
		if _, err := z.conn.ReadResponse(); err != nil {
			return "", err
		}
		return "", ErrUnasked
	}
	fd := fdpass.NoFD
	if o.netns != nil {
		fd = o.netns.ns.FD()
	}
	if err := z.conn.SendRequest(o.req, fd); err != nil {
		return "", fmt.Errorf("send %v: %w", o, late(err))
	}
	nack, err = z.conn.ReadResponse()
	if err != nil {
		// Acks carry no id. If this one came later it would be taken for the
		// answer to the next message, so the connection ends here; ztunnel dials
		// again and gets a snapshot. The real agent keeps the connection, and
		// from then on every answer may be one message late.
		return "", fmt.Errorf("answer to %v: %w", o, late(err))
	}
	return nack, nil
}

// readable tells whether a packet, or the end, lies there to be read.
func readable(conn *net.UnixConn) (bool, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, err
	}
	var n int
	err = raw.Control(func(fd uintptr) {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	return n > 0, err
}

// late words a deadline that has passed.
func late(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ErrLate
	}
	return err
}

// answered notes what became of o.
func (a *Agent) answered(z *ztunnel, o *op, nack string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		// leave deals with it, as with everything that was queued behind.
		z.queue = append([]*op{o}, z.queue...)
		if a.current(o) {
			o.pod.fail(fmt.Sprintf("ztunnel %d: %v", z.peer.PID, err))
		}
		return
	}
	defer o.netns.release()
	if nack != "" {
		// In a snapshot, too: the other pods have nothing to do with it.
		a.log.Warn("ztunnel says no", "ztunnel", z.number, "pid", z.peer.PID, "to", o.what, "uid", o.uid, "nack", nack)
	}
	switch {
	case o.what == "snapshot":
		z.snapshot = true
		a.log.Info("snapshot sent", "ztunnel", z.number, "pid", z.peer.PID, "after", time.Since(z.since))
	case o.what == "del":
		o.done <- Outcome{PID: z.peer.PID, Nack: nack}
	case a.current(o):
		z.answers[o.uid] = answer{to: o.what, at: time.Now(), nack: nack}
		if nack != "" {
			o.pod.fail(fmt.Sprintf("ztunnel %d: %s", z.peer.PID, nack))
		} else if o.what == "add" {
			o.pod.lastError, o.pod.lastErrorAt = "", time.Time{}
		}
		if o.what == "add" {
			o.pod.tell(Outcome{PID: z.peer.PID, Nack: nack})
		}
	}
}

// current tells whether o speaks of a pod that is still there, and of the
// namespace that it still has. The caller holds the lock.
func (a *Agent) current(o *op) bool {
	return o.pod != nil && a.pods[o.uid] == o.pod && o.pod.netns == o.netns
}
