package inpod

import (
	"context"
	"net"
	"os"
	"sync"
	"time"
)

// peers are the connections being served, MaxPeers at most. One that has not
// sent its message yet keeps its place only while nobody else needs it: a flood
// of silent peers delays a good one by a fraction of a second, not by their
// whole deadline.
type peers struct {
	slots chan struct{} // one token a connection

	mu       sync.Mutex
	silent   map[*peer]struct{}
	stopping bool
}

// peer is a connection that has not sent its message.
type peer struct {
	conn    *net.UnixConn
	since   time.Time
	evicted error
}

// place waits for a free place and takes it. It returns false when ctx ends.
func (ps *peers) place(ctx context.Context) bool {
	select {
	case ps.slots <- struct{}{}:
		return ctx.Err() == nil
	default:
	}
	for {
		select {
		case ps.slots <- struct{}{}:
			return true
		case <-ctx.Done():
			return false
		case <-time.After(patience):
			ps.crowded()
		}
	}
}

// enter notes that conn is silent, and gives it a deadline.
func (ps *peers) enter(conn *net.UnixConn) *peer {
	p := &peer{conn: conn, since: time.Now()}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.silent == nil {
		ps.silent = make(map[*peer]struct{})
	}
	ps.silent[p] = struct{}{}
	conn.SetReadDeadline(p.since.Add(PeerTimeout))
	if ps.stopping {
		p.evict(ErrStopping)
	}
	return p
}

// evict ends the peer's wait. The caller holds the lock.
func (p *peer) evict(why error) {
	p.evicted = why
	p.conn.SetReadDeadline(time.Unix(1, 0))
}

// leave notes that p has spoken, and returns why it was told to leave, if it was.
func (ps *peers) leave(p *peer) error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	delete(ps.silent, p)
	return p.evicted
}

// crowded ends the patience with every peer that has been silent for long.
func (ps *peers) crowded() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for p := range ps.silent {
		if p.evicted == nil && time.Since(p.since) >= patience {
			p.evict(ErrCrowded)
		}
	}
}

// stop ends the wait of every silent peer, now and from now on.
func (ps *peers) stop() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.stopping = true
	for p := range ps.silent {
		p.evict(ErrStopping)
	}
}

// spare is a descriptor held back for the moment when the table is full: given
// up, it makes room for one accept, which is enough to say so to the peer.
type spare struct{ f *os.File }

// take holds one back, unless one is held. While there is none to have, there
// is none to lend.
func (s *spare) take() {
	if s.f == nil {
		s.f, _ = os.Open(os.DevNull)
	}
}

// lend gives the descriptor up, if there is one to give.
func (s *spare) lend() bool {
	if s.f == nil {
		return false
	}
	s.close()
	return true
}

func (s *spare) close() {
	if s.f != nil {
		s.f.Close()
		s.f = nil
	}
}
