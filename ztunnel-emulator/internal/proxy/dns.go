package proxy

import (
	"context"
	"io"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/dns"
)

// forwarder asks the node's resolvers from inside the pod. It is made when the pod
// asks for the first time: many pods start at once, and an agent waits for each.
func (p *Pod) forwarder() *dns.Forwarder {
	p.dnsNeeded.Do(func() {
		p.dns = &dns.Forwarder{Resolvers: p.config.DNS, Dial: p.dialDNS, Log: p.config.Log.With(accesslog.Target, "dns")}
	})
	return p.dns
}

// dialDNS makes a marked socket to a resolver: by its mark the pod's rules let it
// pass, and keep it apart from the application's own.
func (p *Pod) dialDNS(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
	kind := unix.SOCK_DGRAM
	if network == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err := p.socket(server.Addr(), kind)
	if err != nil {
		return nil, err
	}
	c, err := finishConnect(ctx, fd, server)
	if err != nil {
		return nil, err
	}
	conn := net.Conn(netConn{c})
	if kind == unix.SOCK_DGRAM {
		conn = datagrams{netConn{c}}
	}
	if p.letPass() {
		return conn, nil
	}
	return p.asked(conn, netConn{c}.local()), nil
}

// datagrams is a netConn of which an empty datagram is not the end: to an os.File it
// would be.
type datagrams struct{ netConn }

func (d datagrams) Read(b []byte) (int, error) {
	n, err := d.netConn.Read(b)
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// asking is a query of ours that does not bear the rules' mark: they may bring it
// back to us, as a query.
type asking struct {
	net.Conn
	pod  *Pod
	from netip.AddrPort
}

func (p *Pod) asked(c net.Conn, from netip.AddrPort) net.Conn {
	a := asking{c, p, from}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asking == nil {
		p.asking = make(map[netip.AddrPort]struct{})
	}
	p.asking[a.from] = struct{}{}
	return a
}

func (a asking) Close() error {
	a.pod.mu.Lock()
	delete(a.pod.asking, a.from)
	a.pod.mu.Unlock()
	return a.Conn.Close()
}

// asksOurselves is isOurs of a query.
func (p *Pod) asksOurselves(from netip.AddrPort) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ours := p.asking[from]
	return ours
}

// DNS answers a query that came as a datagram, and returns at once. reply is
// called with the answer, or not at all.
func (p *Pod) DNS(query []byte, from netip.AddrPort, reply func([]byte)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.wg.Add(1)
	go p.dnsQuery(query, from, reply)
}

func (p *Pod) dnsQuery(query []byte, from netip.AddrPort, reply func([]byte)) {
	defer p.wg.Done()
	if p.asksOurselves(from) {
		p.refuseDNS(from)
		// Nobody to ask: who has asked us, and waits, hears that at once.
		if answer := new(dns.Forwarder).Answer(p.ctx, query, "udp"); answer != nil {
			reply(answer)
		}
		return
	}
	if answer := p.forwarder().Answer(p.ctx, query, "udp"); answer != nil {
		reply(answer)
	}
}

// dnsOverTCP serves a connection to 15053, and takes it over.
func (p *Pod) dnsOverTCP(fd int) {
	c := NewConn(fd)
	if from := (netConn{c}).name(unix.Getpeername); p.asksOurselves(from) {
		p.refuseDNS(from)
		c.reset()
		return
	}
	p.forwarder().ServeTCP(p.ctx, netConn{c})
	if p.ctx.Err() != nil {
		// The rules go with the pod: whoever is told by a FIN could not get the
		// answer to us, and would keep the namespace with it.
		c.reset()
		return
	}
	c.Close()
}

func (p *Pod) refuseDNS(from netip.AddrPort) {
	l := line{pod: p, src: from, dst: netip.AddrPortFrom(from.Addr(), PortDNS), outbound: true}
	l.deny(errRecursive)
}

// netConn is a Conn for those who want a net.Conn. Package net would make one
// only of a second descriptor.
type netConn struct{ Conn }

// CloseWrite is for who ends a tunnel gently.
func (c netConn) CloseWrite() error { return c.closeWrite() }

func (c netConn) LocalAddr() net.Addr  { return tcpAddr(c.local()) }
func (c netConn) RemoteAddr() net.Addr { return tcpAddr(c.name(unix.Getpeername)) }

func (c netConn) local() netip.AddrPort { return c.name(unix.Getsockname) }

func (c netConn) name(of func(int) (unix.Sockaddr, error)) (addr netip.AddrPort) {
	c.control(func(fd int) error {
		sa, err := of(fd)
		if err == nil {
			addr = AddrPort(sa)
		}
		return err
	})
	return addr
}
