package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/workload"
)

// route sends an outbound connection, which it takes over, where the mesh says:
// into a tunnel, or in the clear, or nowhere.
func (p *Pod) route(l *line, fd int, dst netip.AddrPort) {
	own, err := p.own()
	if err != nil {
		l.deny(err)
		resetFD(fd)
		return
	}
	state := p.mesh().Store.State()
	route, err := state.Route(workload.Request{Source: own, Client: l.src.Addr(), Dst: dst, Network: p.mesh().Network})
	if err != nil {
		l.deny(err)
		resetFD(fd)
		return
	}
	l.dst, l.srcParty, l.dstParty = route.NextHop, partyOf(own), partyOf(route.Workload)
	if route.Service != nil {
		l.service = route.Service.Hostname
	}
	if route.Protocol != workload.HBONE {
		p.relayTo(l, fd, route.NextHop, netip.Addr{}, nil)
		return
	}
	p.send(l, fd, own, route)
}

// send carries a connection, which it takes over, in a tunnel.
func (p *Pod) send(l *line, fd int, own *workload.Workload, route workload.Route) {
	l.hbone, l.mtls = route.Authority, true
	s := &session{accepted: NewConn(fd)}
	ctx, cancel := context.WithCancelCause(p.ctx)
	defer cancel(nil)
	s.cancel = cancel
	if !p.begin(s) {
		s.accepted.reset()
		return
	}
	l.opened()
	fields := hbone.RequestHeaders(own.Baggage(), hbone.Forwarded(l.src, l.service), hbone.NewTraceparent(), "")
	dial := func(ctx context.Context) (*hbone.ClientConn, error) { return p.dialTunnel(ctx, own, route) }
	stream, _, err := p.pool.Open(ctx, poolKey(l, own, route), dial, route.Authority, fields)
	if err == nil {
		err = p.tunnelled(s, stream)
	}
	if err != nil {
		s.accepted.reset()
		p.forget(s)
		l.complete(Counts{}, tunnelError(s.why(err)))
		return
	}
	p.wg.Add(1)
	go p.relaySent(l, s)
}

// relaySent is the relay of an outbound connection and its stream.
func (p *Pod) relaySent(l *line, s *session) {
	defer p.wg.Done()
	c, err := s.stream.Relay(s.accepted.File)
	p.streamed(l, s, s.accepted, Counts{Sent: c.Sent, Received: c.Received}, err)
}

// streamed is the end of a stream and of the connection app that it was relayed to.
func (p *Pod) streamed(l *line, s *session, app Conn, c Counts, err error) {
	err = s.why(err)
	if s.cause.Load() != nil {
		app.reset()
	} else {
		closeAfter(app, err)
	}
	p.forget(s)
	if gone(err) {
		err = nil
	}
	l.complete(c, err)
}

// dialTunnel makes a tunnel from inside the pod.
func (p *Pod) dialTunnel(ctx context.Context, own *workload.Workload, route workload.Route) (*hbone.ClientConn, error) {
	limit, cancel := context.WithTimeout(ctx, p.connectTime())
	defer cancel()
	fd, err := p.lastingSocket(route.NextHop.Addr())
	if err != nil {
		return nil, err
	}
	c, err := finishConnect(limit, fd, route.NextHop)
	if err != nil {
		if ctx.Err() == nil && errors.Is(limit.Err(), context.DeadlineExceeded) {
			err = &tunnelTimeout{err}
		}
		return nil, err
	}
	t := p.track(c, false)
	if t == nil {
		return nil, errEnding
	}
	conn, err := hbone.Dial(ctx, t, p.mesh().Identities.ClientConfig(idOf(own), parseIDs(route.Identities)), p.mesh().HBONE)
	if err != nil {
		return nil, err
	}
	t.established(conn)
	return conn, nil
}

// tunnelTimeout is a tunnel's port that does not answer.
type tunnelTimeout struct{ err error }

func (e *tunnelTimeout) Error() string {
	return "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: " + osError(e.err)
}
func (e *tunnelTimeout) Unwrap() error { return e.err }

// tunnelError words why a connection has no tunnel.
func tunnelError(err error) error {
	var timeout *tunnelTimeout
	var status *hbone.StatusError
	var handshake *hbone.HandshakeError
	switch {
	case errors.Is(err, errEnding), errors.Is(err, context.Canceled):
		return errDrained
	case errors.As(err, &timeout), errors.As(err, &status):
		return err
	case errors.As(err, &handshake), saidByTLS(err):
		return fmt.Errorf("io error: %w", err)
	}
	if errno := unix.Errno(0); errors.As(err, &errno) {
		return fmt.Errorf("io error: %s", osError(err))
	}
	return err
}

// saidByTLS tells an alert of the peer. A TLS 1.3 client is done before the server
// has judged its certificate: a refusal comes after the handshake.
func saidByTLS(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}
