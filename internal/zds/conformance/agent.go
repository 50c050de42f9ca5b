package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

// The three classes of refusal (zds.md §4).
const (
	nackRead    = "failure to read message : "
	nackStart   = "failure to start proxy : "
	nackProcess = "failure to process message : "
)

// agent is the suite in the agent's place: it listens, and the ztunnel under
// test dials.
type agent struct {
	bench
	l     *uds.Listener
	conn  *net.UnixConn // the one connection, or nil
	hello packet        // its first packet
	pid   int           // the client's process, 0 if it can't be seen
	stop  func() bool
	over  bool // the client has exited, as promised, and somebody else restarts it
}

func newAgent(ctx context.Context, o Options) *agent { return &agent{bench: newBench(ctx, o)} }

func (a *agent) listen() error {
	l, err := uds.Listen(zds.Network, a.o.Path)
	if err == nil {
		a.l = l
	}
	return err
}

// end leaves nothing behind: the client that we started, the connection, the socket.
func (a *agent) end() {
	a.hangUp()
	if a.proc != nil {
		a.proc.stop()
	}
	if a.l != nil {
		a.l.Close()
	}
}

// hangUp ends the connection.
func (a *agent) hangUp() {
	if a.conn != nil {
		a.stop()
		a.conn.Close()
		a.conn = nil
	}
}

// fresh ends the connection that there is and waits for the client to dial
// anew and to say hello. The client is started if need be.
func (a *agent) fresh() {
	a.hangUp()
	within := redialWithin
	if a.start() || a.over {
		within = a.o.Wait
	}
	if a.over {
		a.say("  the client has exited, as it should: start it again; waiting %v", within)
	}
	a.accept(within)
	a.over = false
}

// start starts the client if that is for us to do and it is not running.
func (a *agent) start() (started bool) {
	if len(a.o.Command) == 0 {
		// The first time it may be anywhere.
		return a.pid == 0
	}
	if a.proc != nil {
		if _, ended := a.proc.exited(); !ended {
			return false
		}
	}
	var err error
	if a.proc, err = startProcess(a.o.Command, a.o.Output); err != nil {
		a.notTried("start the client: %v", err)
	}
	return true
}

// accept takes the next connection that lives.
func (a *agent) accept(within time.Duration) {
	deadline := time.Now().Add(within)
	for dials := 0; ; dials++ {
		conn := a.next(deadline, dials)
		a.stop = a.watch(conn)
		a.conn = conn
		peer, err := uds.PeerOf(conn)
		if err != nil {
			a.notTried("%v", err)
		}
		a.pid = int(peer.PID)
		a.hello, err = a.recvWithin(conn, answerWithin)
		if err == nil && !hungUp(conn) {
			a.hello.close()
			return
		}
		// Somebody who exited with a connection in our backlog, for example.
		a.hello.close()
		a.hangUp()
		if err != nil && !time.Now().Before(deadline) {
			a.broken("the client dialled %d times and never said hello: %v", dials+1, err)
		}
	}
}

// next is the next connection in the backlog, if one comes in time.
func (a *agent) next(deadline time.Time, dials int) *net.UnixConn {
	start := time.Now()
	for said := start; ; {
		a.l.SetDeadline(time.Now().Add(100 * time.Millisecond))
		conn, err := a.l.AcceptUnix()
		if a.ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			panic(verdict{NotTried, "interrupted"})
		}
		if err == nil {
			return conn
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			a.notTried("accept: %v", err)
		}
		if a.proc != nil {
			if status, ended := a.proc.exited(); ended {
				a.broken("the client has exited with status %d; its last words: %s", status, a.proc.tail)
			}
		}
		if time.Now().After(deadline) {
			if a.over || a.pid == 0 {
				a.notTried("no client dialled %s within %v (connections before that: %d)", a.o.Path, time.Since(start).Round(time.Second), dials)
			}
			a.broken("the client did not dial again within %v", time.Since(start).Round(time.Second))
		}
		if time.Since(said) > 5*time.Second {
			said = time.Now()
			a.say("  waiting for a client to dial %s, %v more", a.o.Path, time.Until(deadline).Round(time.Second))
		}
	}
}

// send sends bytes as they are.
func (a *agent) send(b []byte, fds ...int) {
	if err := sendPacket(a.conn, b, fds...); err != nil {
		a.broken("the client closed the connection before it could be asked (%v)", err)
	}
}

// request sends a well-formed request.
func (a *agent) request(req *zds.WorkloadRequest, fds ...int) { a.send(encode(req), fds...) }

func encode(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err) // our own words
	}
	return b
}

// answer waits for the answer to what, and judges its form.
func (a *agent) answer(what string) (nack string) {
	p, err := a.recvWithin(a.conn, answerWithin)
	defer p.close()
	if err != nil {
		a.broken("%s: no answer: %v", what, err)
	}
	switch {
	case len(p.fds) > 0:
		a.broken("%s: the answer came %s", what, p)
	case len(p.b) > zds.MaxPacket:
		a.broken("%s: the answer has %d bytes, more than the %d that the agent can read", what, len(p.b), zds.MaxPacket)
	}
	nack, err = zds.ParseResponse(p.b)
	if err != nil {
		a.broken("%s: the answer %s does not parse: %v", what, p, err)
	}
	if want := encode(zds.Response(nack)); string(want) != string(p.b) {
		a.broken("%s: the answer is %s, which should be [% x]", what, p, want)
	}
	return nack
}

// ack asks, and the answer has to be yes.
func (a *agent) ack(req *zds.WorkloadRequest, fds ...int) {
	a.ackRaw(encode(req), zds.Describe(req), fds...)
}

func (a *agent) ackRaw(b []byte, what string, fds ...int) {
	a.send(b, fds...)
	if nack := a.answer(what); nack != "" {
		a.broken("%s [% .64x]: refused with %q", what, b, nack)
	}
}

// nack asks, and the answer has to be a refusal of that class. It returns the cause.
func (a *agent) nack(class string, req *zds.WorkloadRequest, fds ...int) string {
	return a.nackRaw(class, encode(req), zds.Describe(req), fds...)
}

func (a *agent) nackRaw(class string, b []byte, what string, fds ...int) string {
	a.send(b, fds...)
	got := a.answer(what)
	cause, ok := strings.CutPrefix(got, class)
	if !ok {
		a.broken("%s: %q was expected, the answer is %q", what, class+"…", got)
	}
	return cause
}

// serve adds a pod, which has to go well.
func (a *agent) serve(p *pod) map[int]string {
	a.ack(p.add(), p.ns.FD())
	p.served("after the ack of an add")
	return p.sockets()
}

// snapshot ends the snapshot, which has to go well.
func (a *agent) snapshot() { a.ack(zds.Snapshot()) }

// alive makes sure that the connection still works.
func (a *agent) alive(when string) {
	a.send(encode(zds.Del(a.prefix + "-nobody")))
	if nack := a.answer("del of an unknown uid, " + when); nack != "" {
		a.broken("del of an unknown uid, %s: refused with %q", when, nack)
	}
}

// exits makes sure that the client's process ends, with a status where that can
// be seen.
func (a *agent) exits(status int, when string) {
	within := soon + 2*time.Second
	if a.proc == nil {
		a.over = true
		if a.pid == 0 {
			a.ended(a.conn, within, when)
			a.note = "the connection ended; whether the process did can't be seen from here"
		} else if !a.until(within, func() bool { return gone(a.pid) }) {
			a.over = false
			a.broken("%s: process %d is still there after %v", when, a.pid, within)
		} else {
			a.note = "the process is gone; its status can't be seen by who did not start it"
		}
		return
	}
	if !a.until(within, func() bool { _, ended := a.proc.exited(); return ended }) {
		a.broken("%s: the process is still there after %v", when, within)
	}
	if got, _ := a.proc.exited(); got != status {
		a.broken("%s: the process has exited with status %d, not %d; its last words: %s", when, got, status, a.proc.tail)
	}
}

// sameProcess makes sure that the client that dialled is the one of before.
func (a *agent) sameProcess(before int, when string) {
	if a.pid != before {
		a.broken("%s: another process has dialled, %d and not %d", when, a.pid, before)
	}
}

// uidField is a del or keep with its uid in any field.
func uidField(member, field byte, uid string) []byte {
	inner := append([]byte{field<<3 | 2, byte(len(uid))}, uid...)
	return append([]byte{member<<3 | 2, byte(len(inner))}, inner...)
}

// padded is an add, or a keep if name is empty, of exactly n bytes.
func padded(p *pod, n int, withInfo bool) []byte {
	pad := strings.Repeat("x", n)
	for {
		req := zds.Keep(p.uid + pad)
		if withInfo {
			req = zds.Add(p.uid, p.name+pad, podNamespace, podServiceAccount)
		}
		b := encode(req)
		if len(b) == n {
			return b
		}
		if len(b) < n {
			panic(fmt.Sprintf("no message of %d bytes", n))
		}
		pad = pad[1:]
	}
}
