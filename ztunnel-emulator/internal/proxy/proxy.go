package proxy

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/dns"
	"ambient-emulator/ztunnel-emulator/internal/hbone"
)

// The ports of an ambient pod that ztunnel binds itself.
const (
	PortInbound            = 15008 // HBONE: what another ztunnel sends
	PortInboundPassthrough = 15006 // captured inbound plaintext
	PortOutbound           = 15001 // captured outbound
	PortDNS                = 15053 // captured DNS
)

// illegal tells the ports that lead back to ztunnel. (15053 is not among the real
// ztunnel's either.)
func illegal(port uint16) bool {
	return port == PortInbound || port == PortInboundPassthrough || port == PortOutbound
}

// Config is what all pods of a ztunnel have in common.
type Config struct {
	Mark        uint32        // SO_MARK of every socket that is made in a pod; 0 for none
	KeepAlive   KeepAlive     // of connections that last, on both sides
	ConnectTime time.Duration // how long a connect may take; 0 is ConnectTimeout
	DNS         dns.Resolvers // without a server, every query is answered with SERVFAIL
	Log         *slog.Logger  // access lines
	Mesh        *Mesh         // nil: everything is carried in the clear
}

// Identity is who a pod is, as the agent says. In the seed's mode nobody says.
type Identity struct{ Name, Namespace, ServiceAccount string }

// Pod is what the connections of one pod have in common. It makes sockets in the
// pod, and knows all connections, so that none outlives it.
type Pod struct {
	Identity
	config *Config
	// enter runs a function on a thread that is in the pod, or returns an error
	// when the pod has ended.
	enter func(func() error) error
	// unredirected, if set, takes over a connection to 15001 or 15006 that nobody
	// has redirected. It is the seed's; otherwise such a call is a loop.
	unredirected func(fd int)

	dns       *dns.Forwarder // see forwarder
	dnsNeeded sync.Once

	ctx context.Context // ends with the pod
	end context.CancelFunc
	wg  sync.WaitGroup // every goroutine that deals with this pod's traffic

	sayNoSrc, sayNoMark, sayCrowded sync.Once

	handshakes atomic.Int32 // under way at 15008

	pool *hbone.Pool // tunnels to others; nil without a mesh

	mu       sync.Mutex
	draining bool // no tunnel may bring new streams
	closed   bool
	arriving int // connections that are not yet among the following
	open     map[*session]struct{}
	tunnels  map[*tunnel]struct{}
	asking   map[netip.AddrPort]struct{} // see asksOurselves
}

// NewPod returns what serves the connections of a pod. enter runs a function on
// a thread inside the pod's namespace. Close it.
func (c *Config) NewPod(id Identity, enter func(func() error) error, unredirected func(fd int)) *Pod {
	p := &Pod{Identity: id, config: c, enter: enter, unredirected: unredirected, open: make(map[*session]struct{})}
	p.ctx, p.end = context.WithCancel(context.Background())
	if c.Mesh != nil {
		c.Mesh.join(p)
	}
	return p
}

// Serve takes over a connection that was accepted at one of ztunnel's ports, and
// returns at once.
func (p *Pod) Serve(port uint16, fd int) {
	p.mu.Lock()
	closed := p.closed
	if !closed {
		p.wg.Add(1)
		p.arriving++
	}
	p.mu.Unlock()
	if closed {
		resetFD(fd)
		return
	}
	go p.take(port, fd)
}

// take deals with a connection until it goes on by itself, as a relay or a tunnel,
// or has ended.
func (p *Pod) take(port uint16, fd int) {
	defer p.wg.Done()
	switch port {
	case PortOutbound:
		p.outbound(fd)
	case PortInboundPassthrough:
		p.inboundPassthrough(fd)
	case PortInbound:
		p.inbound(fd)
	case PortDNS:
		p.dnsOverTCP(fd)
	default:
		unix.Close(fd)
	}
	p.mu.Lock()
	p.arriving--
	p.mu.Unlock()
}

// session is a connection on its way through the pod: two sockets, or a socket and
// a stream of a tunnel.
type session struct {
	accepted, onward Conn          // no File when there is none, or not yet
	stream           *hbone.Stream // in place of one of them
	cancel           context.CancelCauseFunc

	// judge asks the policies about an inbound connection. It may be nil.
	judge func() error
	cause atomic.Pointer[error]
}

// errDrained is what the access line of a connection says that did not end by
// itself.
var errDrained = errors.New("connection closed due to connection drain")

// errEnding is told to who wants to connect in a pod that has ended.
var errEnding = errors.New("the pod has ended")

// begin registers a session, or returns false when the pod has ended.
func (p *Pod) begin(s *session) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.open[s] = struct{}{}
	return true
}

// connecting adds the connection onward to a session, so that it can be cut while
// it connects; or says why the session has been cut already.
func (p *Pod) connecting(s *session, onward Conn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if cause := s.cause.Load(); cause != nil {
		return *cause
	}
	if p.closed {
		return errEnding
	}
	s.onward = onward
	return nil
}

// forget is the end of a session. Its connections are closed by the caller.
func (p *Pod) forget(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, s)
}

// sessions returns those that there are.
func (p *Pod) sessions() []*session {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Keys(p.open))
}

// cut ends a session from outside; cause goes to its access line. It is closed in a
// moment, by whoever serves it.
func (p *Pod) cut(s *session, cause error) {
	p.mu.Lock()
	s.cause.CompareAndSwap(nil, &cause)
	conns, stream, cancel := [...]Conn{s.accepted, s.onward}, s.stream, s.cancel
	p.mu.Unlock()
	// Without the lock: a stream's peer may be slow.
	for _, c := range conns {
		if c.File != nil {
			abort(c)
		}
	}
	if cancel != nil {
		cancel(cause)
	}
	if stream != nil {
		stream.Cancel(cause)
	}
}

// WaitIdle waits until all connections have ended by themselves, so long at most.
func (p *Pod) WaitIdle(most time.Duration) {
	for deadline := time.Now().Add(most); !p.idle() && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
}

// idle tells whether there is nothing to wait for. A tunnel that somebody has made
// to us counts, because streams may be under way in it; our own do not.
func (p *Pod) idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for t := range p.tunnels {
		if t.inbound {
			return false
		}
	}
	return p.arriving == 0 && len(p.open) == 0
}

// Close ends every connection of the pod at once and waits until they are closed.
// The namespace has to stay enterable until then.
func (p *Pod) Close() {
	p.mu.Lock()
	p.closed = true
	for t := range p.tunnels {
		t.abandon()
	}
	p.mu.Unlock()
	for _, s := range p.sessions() {
		p.cut(s, errDrained)
	}
	p.end()
	// All at once: each takes half a second if its peer does not read.
	var closing sync.WaitGroup
	for _, t := range p.allTunnels() {
		closing.Go(func() { t.Close() })
	}
	closing.Wait()
	if p.mesh() != nil {
		p.mesh().part(p)
		p.pool.Close()
	}
	p.wg.Wait()
}
