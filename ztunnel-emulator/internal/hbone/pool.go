package hbone

import (
	"container/list"
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"
)

// Key is which tunnels may be shared: what a CONNECT asks for is not part of it.
type Key struct {
	Source   string         // our identity
	Expected string         // the identities we accept, joined in order
	Dst      netip.AddrPort // the next hop
	SrcIP    netip.Addr
}

// Pool holds the tunnels of one workload that streams share. A tunnel is lent to
// several at once, up to the limit of its streams; one that reached the limit is
// not lent again and ends with its last stream.
type Pool struct {
	cfg Config

	mu     sync.Mutex
	lanes  map[Key]*lane
	recent list.List // of *pooled that may be lent, the last used first
	all    map[*pooled]struct{}
	closed bool
}

// lane is one key's tunnels. It exists while it has any, or is waited for.
type lane struct {
	ready   []*pooled
	attempt *attempt // to make one more, one at a time
}

// attempt is what others wait for while one user makes a tunnel.
type attempt struct {
	done  chan struct{}
	err   error
	given bool // up by its user: the others try again
}

// pooled is one tunnel, guarded by the pool's mu.
type pooled struct {
	cc     *ClientConn
	key    Key
	inUse  int
	ready  bool        // in its lane, to be lent again
	served atomic.Bool // it has answered a request; not guarded
	recent *list.Element
	unused *time.Timer
}

// notSentTries is how often a request that was surely not processed is tried.
const notSentTries = 4

// NewPool returns an empty pool.
func NewPool(cfg Config) *Pool {
	return &Pool{cfg: cfg, lanes: map[Key]*lane{}, all: map[*pooled]struct{}{}}
}

// Open opens a stream on a tunnel of key, which dial makes if there is none.
// Users that need a tunnel at the same moment wait for one attempt and share its
// result, an error too; if whoever makes it gives up (its ctx ends), the next
// one tries. A request that a dying tunnel did not process goes to another; not so
// when the tunnel has just ended and never answered any: a peer that does not
// accept our certificate says so after our handshake, and would again.
func (p *Pool) Open(ctx context.Context, key Key, dial func(context.Context) (*ClientConn, error), authority string, fields []hpack.HeaderField) (*Stream, *Response, error) {
	for try := 1; ; try++ {
		t, err := p.borrow(ctx, key, dial)
		if err != nil {
			return nil, nil, err
		}
		back := sync.OnceFunc(func() { p.giveBack(t) })
		s, r, err := t.cc.open(ctx, authority, fields, back)
		if r != nil {
			t.served.Store(true)
		}
		if err == nil {
			return s, r, nil
		}
		back()
		if errors.Is(err, errEnded) && !t.served.Load() {
			return nil, nil, unanswered(t.cc.Err())
		}
		if !errors.Is(err, ErrNotSent) || try == notSentTries {
			return s, r, err
		}
		p.retire(t)
	}
}

// borrow returns a tunnel that has room for one more stream, which it counts.
func (p *Pool) borrow(ctx context.Context, key Key, dial func(context.Context) (*ClientConn, error)) (*pooled, error) {
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, ErrClosed
		}
		l := p.lanes[key]
		if l == nil {
			l = &lane{}
			p.lanes[key] = l
		}
		if t := p.lend(l); t != nil {
			p.mu.Unlock()
			return t, nil
		}
		a := l.attempt
		if a == nil {
			a = &attempt{done: make(chan struct{})}
			l.attempt = a
			p.lanes[key] = l // lend may have dropped an empty one
			p.mu.Unlock()
			return p.create(ctx, key, l, a, dial)
		}
		p.mu.Unlock()
		select {
		case <-a.done:
			if a.err != nil && !a.given {
				return nil, a.err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// create is the one attempt of a lane.
func (p *Pool) create(ctx context.Context, key Key, l *lane, a *attempt, dial func(context.Context) (*ClientConn, error)) (*pooled, error) {
	cc, err := dial(ctx)
	p.mu.Lock()
	l.attempt = nil
	if err == nil && p.closed {
		err = ErrClosed
		defer cc.Close()
	}
	var t *pooled
	if err == nil {
		t = &pooled{cc: cc, key: key}
		p.all[t] = struct{}{}
		p.use(l, t)
	} else {
		a.err, a.given = err, ctx.Err() != nil
		p.tidy(key, l)
	}
	p.mu.Unlock()
	close(a.done)
	if t != nil {
		cc.whenDone(func() { p.ended(t) })
	}
	return t, err
}

// lend finds a living tunnel and counts one more stream on it. mu is held.
func (p *Pool) lend(l *lane) *pooled {
	for len(l.ready) > 0 {
		t := l.ready[len(l.ready)-1]
		if t.cc.usable() {
			p.use(l, t)
			return t
		}
		p.forget(l, t)
	}
	return nil
}

// use counts one more stream on t, and keeps t for others if there is room for
// another one after that. mu is held.
func (p *Pool) use(l *lane, t *pooled) {
	t.inUse++
	if t.inUse >= t.cc.limit() {
		p.forget(l, t)
		return
	}
	if t.ready {
		p.recent.MoveToFront(t.recent)
		t.unused.Reset(p.cfg.UnusedTimeout)
		return
	}
	t.ready = true
	l.ready = append(l.ready, t)
	t.recent = p.recent.PushFront(t)
	t.unused = time.AfterFunc(p.cfg.UnusedTimeout, func() { p.retire(t) })
	for p.recent.Len() > max(1, p.cfg.PoolSize) {
		p.retireLocked(p.recent.Back().Value.(*pooled))
	}
}

// forget keeps t from being lent again. mu is held.
func (p *Pool) forget(l *lane, t *pooled) {
	if t.ready {
		t.ready = false
		t.unused.Stop()
		p.recent.Remove(t.recent)
		l.ready = slices.DeleteFunc(l.ready, func(other *pooled) bool { return other == t })
	}
	p.tidy(t.key, l)
}

// tidy drops a lane that has nothing. mu is held.
func (p *Pool) tidy(key Key, l *lane) {
	if len(l.ready) == 0 && l.attempt == nil && p.lanes[key] == l {
		delete(p.lanes, key)
	}
}

// retire forgets t, which ends with its last stream.
func (p *Pool) retire(t *pooled) {
	p.mu.Lock()
	p.retireLocked(t)
	p.mu.Unlock()
}

func (p *Pool) retireLocked(t *pooled) {
	if l := p.lanes[t.key]; l != nil {
		p.forget(l, t)
	}
	if t.inUse == 0 {
		t.cc.Drain()
	}
}

// giveBack is a stream that has ended.
func (p *Pool) giveBack(t *pooled) {
	p.mu.Lock()
	t.inUse--
	last := t.inUse == 0 && !t.ready
	p.mu.Unlock()
	if last {
		t.cc.Drain()
	}
}

// ended is a tunnel of which nothing is left.
func (p *Pool) ended(t *pooled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.lanes[t.key]; l != nil {
		p.forget(l, t)
	}
	delete(p.all, t)
}

// Close tears all tunnels down, their streams too, and waits until nothing is
// left of them.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	var all []*pooled
	for t := range p.all {
		all = append(all, t)
	}
	p.mu.Unlock()
	for _, t := range all {
		t.cc.Close()
	}
	for _, t := range all {
		<-t.cc.Done()
	}
}

// Tunnels is how many tunnels there are, those included that only wait for their
// last stream.
func (p *Pool) Tunnels() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all)
}
