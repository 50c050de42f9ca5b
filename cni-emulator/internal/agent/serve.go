package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/uds"
)

// acceptBurst and acceptEvery pace the connections of ztunnels. The real agent
// takes five a second, so that a ztunnel which it drops, and which dials again
// at once, does not keep it busy. So do we, in the long run; but the first ones
// need not wait.
const (
	acceptBurst = 100
	acceptEvery = 200 * time.Millisecond
)

// server is one of the agent's two.
type server struct {
	name   string
	places int // how many connections at once
	burst  int // how many connections come unpaced; 0: all
	handle func(context.Context, *net.UnixConn)
}

// serve accepts until ctx ends, and gives every connection a goroutine, which
// owns it. It returns when the last of them has ended.
func (a *Agent) serve(ctx context.Context, l *uds.Listener, s server) error {
	stop := context.AfterFunc(ctx, func() { l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	places := make(chan struct{}, s.places)
	var owed time.Time // when everybody so far has had his turn
	for {
		if s.burst > 0 {
			now := time.Now()
			owed = later(owed, now).Add(acceptEvery)
			if !pause(ctx, owed.Sub(now)-time.Duration(s.burst)*acceptEvery) {
				return nil
			}
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := l.AcceptUnix()
		if err == nil {
			wg.Add(1)
			go s.serveConn(ctx, conn, places, &wg)
			continue
		}
		<-places
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ECONNABORTED):
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
			// It comes back until something is freed; the connection can wait.
			a.log.Warn("accept "+s.name, "error", err)
			pause(ctx, 100*time.Millisecond)
		default:
			return fmt.Errorf("accept %s: %w", s.name, err)
		}
	}
}

// serveConn serves one connection and gives its place back.
func (s server) serveConn(ctx context.Context, conn *net.UnixConn, places <-chan struct{}, wg *sync.WaitGroup) {
	defer wg.Done()
	defer func() { <-places }()
	s.handle(ctx, conn)
}

// pause waits, and tells whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
