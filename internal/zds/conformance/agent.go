package conformance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

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
			if a.pid == 0 && dials == 0 && !a.over {
				// Nobody would dial for the next promise either.
				a.absent = fmt.Errorf("no client has dialled %s within %v", a.o.Path, a.o.Wait)
				if a.proc != nil {
					a.absent = fmt.Errorf("%w; its last words: %s", a.absent, a.proc.tail)
				}
			}
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
