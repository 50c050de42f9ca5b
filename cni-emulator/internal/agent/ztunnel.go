package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

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

// newest returns the ztunnel that gets new pods, or nil. The caller holds the lock.
func (a *Agent) newest() *ztunnel {
	if len(a.ztunnels) == 0 {
		return nil
	}
	return a.ztunnels[len(a.ztunnels)-1]
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
			// Whoever asked judges why: see Delete.
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
