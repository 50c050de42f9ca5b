package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
)

const (
	// PeerTimeout is how long a peer may take to send its message, and again to
	// take the reply.
	PeerTimeout = 5 * time.Second
	// MaxPeers is how many handoffs are served at once.
	MaxPeers = 256
	// patience is how long a peer may be silent when all places are taken.
	patience = 100 * time.Millisecond
)

// ErrCrowded is told to a silent peer whose place another one needs.
var ErrCrowded = fmt.Errorf("%d peers at once, and this one has not sent its message: connect when it is ready", MaxPeers)

// Handoff is what became of one connection on the seed's wire.
type Handoff struct {
	Peer     uds.Peer
	TID      int           // the thread that received the descriptor
	PeerFD   int           // the namespace's descriptor as it arrived here, or fdpass.NoFD
	NetNS    netns.ID      // zero when none arrived
	Added    Added         // what was done
	Err      error         // the refusal, nil for ready
	Wait     time.Duration // from accept to the descriptor
	Judge    time.Duration // from the descriptor to knowing what it is
	Duration time.Duration // from the descriptor to the reply written
	ReplyErr error         // a sender that did not wait for the reply
}

// Server takes pods from the seed's wire.
type Server struct {
	Pods *Pods
	Log  *slog.Logger

	// Ready is called for each pod newly served, before the sender is told. It
	// may be nil.
	Ready func()
	// Report is called once a connection, after the reply, at once from many
	// goroutines. It may be nil.
	Report func(Handoff)

	peers peers
}

// Serve serves l until ctx ends: every connection on its own, so that a silent
// or slow peer holds up nobody. When it returns, no handoff is running. l stays
// the caller's, and is closed to new connections.
func (s *Server) Serve(ctx context.Context, l *uds.Listener) error {
	s.peers.slots = make(chan struct{}, MaxPeers)
	stop := context.AfterFunc(ctx, func() {
		l.SetDeadline(time.Unix(1, 0))
		s.peers.stop()
	})
	defer stop()

	var spare spare
	defer spare.close()
	pause := pauser{least: 5 * time.Millisecond, most: time.Second}
	var wg sync.WaitGroup
	defer wg.Wait()
	for s.peers.place(ctx) {
		spare.take()
		conn, err := l.AcceptUnix()
		if err == nil {
			pause.reset()
			wg.Add(1)
			go s.serveConn(conn, &wg)
			continue
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ECONNABORTED):
			<-s.peers.slots
			continue
		case !exhausted(err):
			return fmt.Errorf("accept handoffs: %w", err)
		}
		s.Log.Warn("accept a handoff", "error", err, "pause", pause.next())
		if spare.lend() { // even to say no takes a descriptor
			// The kernel says that the table is full before it looks whether
			// anybody is there, so this may wait for long.
			if conn, err := l.AcceptUnix(); err == nil {
				if spare.take(); spare.f != nil {
					wg.Add(1) // meanwhile there is room again
					go s.serveConn(conn, &wg)
					continue
				}
				s.refuse(conn, fdpass.ErrTableFull)
			}
		}
		<-s.peers.slots
		pause.wait()
	}
	return nil
}

// serveConn serves one connection, which it owns.
func (s *Server) serveConn(conn *net.UnixConn, wg *sync.WaitGroup) {
	defer wg.Done()
	defer func() { <-s.peers.slots }()
	h := s.handle(conn)
	conn.Close()
	if s.Report != nil {
		s.Report(h)
	}
}

// handle is one handoff: who is it, take the message, judge it, serve the pod, reply.
func (s *Server) handle(conn *net.UnixConn) Handoff {
	h := Handoff{PeerFD: fdpass.NoFD}
	accepted := time.Now()

	h.Peer, h.Err = uds.PeerOf(conn)
	if h.Err != nil {
		return s.reply(conn, h, accepted)
	}

	p := s.peers.enter(conn)
	fd, err := handoff.Receive(conn)
	evicted := s.peers.leave(p)
	received := time.Now()
	h.TID, h.Wait = unix.Gettid(), received.Sub(accepted)
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("no message within %v", PeerTimeout)
			if evicted != nil {
				err = evicted
			}
		}
		h.Err = err
		return s.reply(conn, h, received)
	}

	h.PeerFD = fd
	ns, err := netns.FromFD(fd) // takes fd
	h.Judge = time.Since(received)
	if err != nil {
		h.Err = fmt.Errorf("the descriptor is refused: %w", err)
		return s.reply(conn, h, received)
	}
	h.NetNS = ns.ID()
	h.Added, h.Err = s.Pods.Add(ns) // takes ns
	if h.Err == nil && h.Added.New && s.Ready != nil {
		s.Ready()
	}
	return s.reply(conn, h, received)
}

// reply answers the peer and stops the clock that began with the descriptor.
func (s *Server) reply(conn *net.UnixConn, h Handoff, began time.Time) Handoff {
	conn.SetWriteDeadline(time.Now().Add(PeerTimeout))
	h.ReplyErr = handoff.Reply(conn, h.Err)
	h.Duration = time.Since(began)
	return h
}

// refuse answers a connection that is not served, and closes it.
func (s *Server) refuse(conn *net.UnixConn, why error) {
	h := s.reply(conn, Handoff{PeerFD: fdpass.NoFD, Err: why}, time.Now())
	conn.Close()
	if s.Report != nil {
		s.Report(h)
	}
}
