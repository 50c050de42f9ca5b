package proxy

import (
	"crypto/tls"
	"errors"
	"net"
	"net/netip"

	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/identity"
)

// tunnel is a tunnel's connection, in either direction. The pod knows all of them,
// so that none outlives it.
type tunnel struct {
	netConn
	pod     *Pod
	inbound bool
	conn    tunnelConn // nil until the handshake is over
}

// tunnelConn is what both ends of a tunnel can.
type tunnelConn interface {
	ConnectionState() tls.ConnectionState
	Drain()
	Close() error
}

// track makes a connection a tunnel of the pod, inbound if somebody has made it to
// us; or resets it and returns nil when the pod has ended.
func (p *Pod) track(c Conn, inbound bool) *tunnel {
	t := &tunnel{netConn: netConn{c}, pod: p, inbound: inbound}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		c.reset()
		return nil
	}
	p.tunnels[t] = struct{}{}
	return t
}

// established says that the handshake is over. What has happened meanwhile to the
// others happens to this one now.
func (t *tunnel) established(conn tunnelConn) {
	p := t.pod
	p.mu.Lock()
	t.conn = conn
	closed, draining := p.closed, p.draining
	p.mu.Unlock()
	switch {
	case closed, p.mesh().CRL.Revoked(conn.ConnectionState().PeerCertificates):
		conn.Close()
	case draining && t.inbound:
		conn.Drain()
	}
}

// abandon makes the end of a tunnel a reset: an orphan that waits for its peer's ACK
// would keep the pod's namespace.
func (t *tunnel) abandon() { t.lingerNot() }

// Close is called once the tunnel is over, by package hbone.
func (t *tunnel) Close() error {
	t.pod.mu.Lock()
	delete(t.pod.tunnels, t)
	t.pod.mu.Unlock()
	return t.netConn.Close()
}

// allTunnels returns those that are established.
func (p *Pod) allTunnels() []tunnelConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []tunnelConn
	for t := range p.tunnels {
		if t.conn != nil {
			all = append(all, t.conn)
		}
	}
	return all
}

// Drain asks who has made tunnels to us to make no new streams in them.
func (p *Pod) Drain() {
	p.mu.Lock()
	p.draining = true
	p.mu.Unlock()
	for _, t := range p.allTunnels() {
		if server, ok := t.(*hbone.ServerConn); ok {
			server.Drain()
		}
	}
}

var errRevoked = errors.New("connection closed: peer certificate revoked by CRL")

// revoke ends the tunnels of peers whose certificate has been revoked.
func (p *Pod) revoke(crl *identity.CRL) {
	for _, t := range p.allTunnels() {
		if crl.Revoked(t.ConnectionState().PeerCertificates) {
			p.mesh().Log.Warn("a peer's certificate has been revoked: its tunnel ends", "pod", p.String())
			t.Close()
		}
	}
}

// why is the reason for the end of a session's tunnel, given what its stream says.
// A tunnel is only ever closed under its streams because the pod ends, which cuts
// them first, or because of a revocation.
func (s *session) why(err error) error {
	if cause := s.cause.Load(); cause != nil {
		return *cause
	}
	if errors.Is(err, hbone.ErrClosed) {
		return errRevoked
	}
	return err
}

var errPolicyChange = errors.New("connection closed due to policy change")

// rejudge ends the inbound connections that are not allowed any more. Without the
// pod's lock: policies that are only tried out write to the log.
func (p *Pod) rejudge() {
	for _, s := range p.sessions() {
		if s.judge != nil && s.judge() != nil {
			p.cut(s, errPolicyChange)
		}
	}
}

// tunnelled adds a stream to a session, unless that has been cut.
func (p *Pod) tunnelled(s *session, stream *hbone.Stream) error {
	p.mu.Lock()
	cause, closed := s.cause.Load(), p.closed
	if cause == nil && !closed {
		s.stream, s.cancel = stream, nil // which was for until there is one
	}
	p.mu.Unlock()
	if cause == nil && !closed {
		return nil
	}
	err := errDrained
	if cause != nil {
		err = *cause
	}
	stream.Cancel(err)
	return err
}

func tcpAddr(a netip.AddrPort) net.Addr { return net.TCPAddrFromAddrPort(a) }
