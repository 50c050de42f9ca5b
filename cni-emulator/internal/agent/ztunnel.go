package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

const (
	// Timeout is how long a ztunnel may take for its hello, and for each answer;
	// the real agent's.
	Timeout = 5 * time.Second
	// MaxZtunnels is how many are served at once. The real agent has no limit;
	// a node has one ztunnel, and two during an upgrade.
	MaxZtunnels = 16
	// maxBehind is how many updates may wait for one ztunnel. One that is further
	// behind is dropped: the snapshot on its return says the same in fewer words.
	// (The real agent makes its callers wait, from the hundredth on.)
	maxBehind = 10000
)

// Why a ztunnel was dropped.
var (
	ErrLate    = errors.New("no answer in time")
	ErrUnasked = errors.New("it sent a packet without being asked")
	ErrTooFar  = errors.New("too many updates wait for it")
)

// ztunnel is one connected ztunnel. Its own goroutine is the only one that
// speaks with it: one message is outstanding at a time, so there is nothing for
// a second one to do.
type ztunnel struct {
	number int
	peer   uds.Peer
	since  time.Time
	conn   *zds.Conn

	// Agent.mu guards these.
	queue    []*op
	idle     bool // the goroutine reads, and whoever queues something interrupts it
	snapshot bool // sent and acked
	dropped  error
	answers  map[string]answer // by uid, of pods that exist, about the namespaces that they have
}

// answer is what a ztunnel said about a pod.
type answer struct {
	to   string
	at   time.Time
	nack string
}

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

// newest returns the ztunnel that gets new pods, or nil. The caller holds the lock.
func (a *Agent) newest() *ztunnel {
	if len(a.ztunnels) == 0 {
		return nil
	}
	return a.ztunnels[len(a.ztunnels)-1]
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

// serveZtunnel is the life of one connection, from accept to close.
func (a *Agent) serveZtunnel(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	peer, err := uds.PeerOf(conn)
	if err != nil {
		a.log.Warn("ztunnel refused", "pid", peer.PID, "uid", peer.UID, "error", err)
		return
	}
	z := &ztunnel{peer: peer, since: time.Now(), conn: zds.NewConn(conn), answers: make(map[string]answer)}
	if a.cfg.Trace != nil {
		z.conn.Trace = func(p zds.Packet) { fmt.Fprintf(a.cfg.Trace, "ztunnel %d: %v\n", peer.PID, p) }
	}
	z.conn.SetDeadline(time.Now().Add(a.timeout))
	version, err := z.conn.ReadHello()
	switch {
	case errors.Is(err, io.EOF), ctx.Err() != nil:
		// Another agent that looks whether we live does that, too.
		a.log.Info("peer left without a hello", "pid", peer.PID)
		return
	case err != nil:
		a.log.Warn("ztunnel refused: no hello", "pid", peer.PID, "uid", peer.UID, "error", late(err))
		return
	case version != zds.Version_V1:
		// As in the real agent; what this one says next will tell more.
		a.log.Warn("ztunnel says hello with an unknown version", "pid", peer.PID, "version", version, "known", zds.Version_V1)
	}

	pods := a.enter(z)
	a.log.Info("ztunnel connected", "ztunnel", z.number, "pid", peer.PID, "uid", peer.UID, "version", version, "snapshot", pods)
	resent, err := a.leave(z, a.converse(z))
	args := []any{"ztunnel", z.number, "pid", peer.PID, "resent", resent}
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, io.EOF):
		a.log.Info("ztunnel left", args...)
	default:
		a.log.Warn("ztunnel dropped", append(args, "error", err)...)
	}
}

// enter makes z the newest ztunnel and queues its snapshot: every pod there is,
// then the word that these were all. Under one lock, so that what changes from
// now on comes after it and nothing is missed. (The real agent makes a
// connection the newest before its hello; then a silent one holds up every add.)
func (a *Agent) enter(z *ztunnel) (pods int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.count++
	z.number = a.count
	z.queue = make([]*op, 0, len(a.pods)+1)
	for _, p := range a.pods {
		o := a.addOp(p)
		o.first = true
		z.queue = append(z.queue, o)
	}
	z.queue = append(z.queue, &op{what: "snapshot", req: zds.Snapshot(), first: true})
	a.ztunnels = append(a.ztunnels, z)
	return len(a.pods)
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
	z.conn.SetDeadline(time.Now().Add(a.timeout))
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

// leave takes z off the list, wherever it stands there, and sends the adds that
// it left unanswered to the ztunnel that is the newest now: what the real agent's
// callers do when they get an error and try again. As there, pods that z had
// already are not replayed to another. It returns why z left: err, unless it was
// told to.
func (a *Agent) leave(z *ztunnel, err error) (resent int, why error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if z.dropped != nil {
		err = z.dropped
	}
	for i, other := range a.ztunnels {
		if other == z {
			a.ztunnels = append(a.ztunnels[:i:i], a.ztunnels[i+1:]...)
			break
		}
	}
	heir := a.newest()
	for _, o := range z.queue {
		switch {
		case o.done != nil:
			// A ztunnel that is gone has no pod, or gets a snapshot without it.
			o.done <- Outcome{PID: z.peer.PID, Err: err}
		case heir != nil && !o.first && a.current(o):
			a.push(heir, a.addOp(o.pod))
			resent++
		}
		o.netns.release()
	}
	z.queue = nil
	return resent, err
}
