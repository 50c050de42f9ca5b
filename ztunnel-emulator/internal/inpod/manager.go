package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

// The timers of the real ztunnel's workload manager.
const (
	retryAfter     = 5 * time.Second // of pending starts
	connectLeast   = 10 * time.Millisecond
	connectMost    = 15 * time.Second
	announceLeast  = 5 * time.Millisecond
	announceMost   = 15 * time.Second
	announceJitter = 0.2
	writeTimeout   = 5 * time.Second // ours: an agent that does not read is gone
)

// The prefixes of a nack, which say what the agent can expect next.
const (
	nackRead    = "failure to read message : "    // the connection is dropped
	nackStart   = "failure to start proxy : "     // the start is tried again
	nackProcess = "failure to process message : " // this process ends
)

// ReadyTask is what the manager adds to the readiness while not every pod is
// known and served.
const ReadyTask = "workload proxy manager"

// Manager feeds Workloads from a node agent: it dials, says hello, and answers
// what the agent sends, for ever.
type Manager struct {
	Path      string // the agent's socket
	Workloads *Workloads
	Readiness *Readiness
	Log       *slog.Logger
	// Trace, if set, is told of each packet.
	Trace func(zds.Packet)
}

// Run connects and serves until ctx ends, which is nil, or until the agent breaks
// the protocol, which is a *ProtocolError. Pods keep their listeners either way.
func (m *Manager) Run(ctx context.Context) error {
	m.Readiness.Block(ReadyTask)
	pause := pauser{least: announceLeast, most: announceMost}
	for {
		conn := m.connect(ctx)
		if conn == nil {
			return nil
		}
		heard, err := m.serve(ctx, conn)
		conn.Close()
		m.Readiness.Block(ReadyTask)
		var fatal *ProtocolError
		switch {
		case errors.As(err, &fatal):
			return err
		case ctx.Err() != nil:
			return nil
		}
		m.Log.Warn("the agent's connection has ended", "socket", m.Path, "error", err)
		if heard {
			pause.reset()
			continue
		}
		// An agent that accepts and closes at once: the real ztunnel dials again
		// without a pause, and both sides spin. We go on as after a failed hello.
		if !sleep(ctx, jitter(pause.advance(), announceJitter)) {
			return nil
		}
	}
}

// connect dials until somebody answers, or returns nil when ctx ends.
func (m *Manager) connect(ctx context.Context) *zds.Conn {
	delay := connectLeast
	for said := ""; ; {
		conn, peer, err := uds.Dial(ctx, zds.Network, m.Path)
		if err == nil {
			m.Log.Info("connected to the agent", "socket", m.Path, "peer_pid", peer.PID, "peer_uid", peer.UID)
			c := zds.NewConn(conn)
			c.Trace = m.Trace
			return c
		}
		if ctx.Err() != nil {
			return nil
		}
		if text := err.Error(); text != said { // once, not at each attempt
			m.Log.Warn("waiting for the agent", "error", err)
			said = text
		}
		delay = min(2*delay, connectMost) // before each sleep: the first is 20 ms
		if !sleep(ctx, delay) {
			return nil
		}
	}
}

// serve is one connection. heard tells whether the agent has asked for anything.
// The error says why it is over.
func (m *Manager) serve(ctx context.Context, conn *zds.Conn) (heard bool, err error) {
	m.Workloads.NewConnection()
	// A deadline in the past ends the wait below when ctx does.
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err := conn.SendHello(); err != nil {
		return false, fmt.Errorf("announce: %w", err)
	}
	var retryAt time.Time // zero: nothing to retry
	for {
		conn.SetReadDeadline(retryAt)
		if ctx.Err() != nil { // first of all, even if there is a message
			return heard, nil
		}
		req, fd, err := conn.ReadRequest()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				closeFD(fd)
			}
			return heard, nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			m.Workloads.Retry()
			retryAt = time.Time{}
			if m.Workloads.HavePending() {
				retryAt = time.Now().Add(retryAfter)
			}
			m.checkReady()
			continue
		case zds.Gone(err):
			return heard, err
		case err != nil:
			// The agent has said something, and is dialled again at once; but not
			// if we are the one who can't receive.
			heard = heard || !errors.Is(err, fdpass.ErrTableFull)
			return heard, errors.Join(err, m.respond(conn, nackRead+err.Error()))
		}
		heard = true

		err = m.Workloads.Handle(req, fd)
		var start *StartError
		switch {
		case err == nil:
			m.checkReady() // before the ack: who sees that may look at once
			err = m.respond(conn, "")
		case errors.As(err, &start):
			if retryAt.IsZero() {
				retryAt = time.Now().Add(retryAfter)
			}
			err = m.respond(conn, nackStart+err.Error())
		default:
			return heard, errors.Join(err, m.respond(conn, nackProcess+err.Error()))
		}
		if err != nil {
			return heard, err
		}
		if !m.Workloads.HavePending() {
			retryAt = time.Time{}
		}
	}
}

func closeFD(fd int) {
	if fd != fdpass.NoFD {
		unix.Close(fd)
	}
}

func (m *Manager) respond(conn *zds.Conn, nack string) error {
	conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err := conn.Respond(nack); err != nil {
		return fmt.Errorf("respond: %w", err)
	}
	return nil
}

// checkReady tells the readiness whether every pod is served.
func (m *Manager) checkReady() {
	if !m.Workloads.Ready() {
		m.Readiness.Block(ReadyTask)
		return
	}
	if m.Readiness.Done(ReadyTask) {
		m.Log.Info("ready", "pods", m.Workloads.Counts().Active)
	}
}

// sleep waits, and returns false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func jitter(d time.Duration, by float64) time.Duration {
	return time.Duration(float64(d) * (1 - by + 2*by*rand.Float64()))
}
