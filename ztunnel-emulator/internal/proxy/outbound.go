package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/workload"
)

// errRecursive is a connection that would come back to us.
var errRecursive = errors.New("attempted recursive call to ourselves")

// outbound serves what the pod's rules have redirected to 15001, and takes it
// over: a connection that the application has made.
func (p *Pod) outbound(fd int) {
	l := line{pod: p, began: time.Now(), outbound: true}
	dst, ok := p.destination(&l, fd, PortOutbound)
	if !ok {
		return
	}
	// The port is one of ours and nobody listens there but ourselves.
	if dst.Addr().IsLoopback() && illegal(dst.Port()) || p.isOurs(l.src) {
		l.deny(errRecursive)
		unix.Close(fd)
		return
	}
	if p.mesh() != nil {
		p.route(&l, fd, dst)
		return
	}
	p.relayTo(&l, fd, dst, netip.Addr{}, nil)
}

// The mark that the pods' rules know, and let pass (sockets.md, section 3).
const (
	rulesMark = 0x539
	rulesMask = 0xfff
)

// isOurs tells whether a connection that has come from src is one that we have made,
// and the rules have brought back because it does not bear their mark. The real
// ztunnel serves it, and thus itself, until it is out of descriptors.
func (p *Pod) isOurs(src netip.AddrPort) bool {
	if p.letPass() {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.open {
		if s.onward.File != nil && (netConn{s.onward}).local() == src {
			return true
		}
	}
	for t := range p.tunnels {
		if t.local() == src {
			return true
		}
	}
	return false
}

// letPass tells whether our sockets bear the mark that the rules let pass.
func (p *Pod) letPass() bool { return p.config.Mark&rulesMask == rulesMark }

// inboundPassthrough serves what the pod's rules have redirected to 15006, and
// takes it over: plaintext for the application.
func (p *Pod) inboundPassthrough(fd int) {
	l := line{pod: p, began: time.Now()}
	dst, ok := p.destination(&l, fd, PortInboundPassthrough)
	if !ok {
		return
	}
	if illegal(dst.Port()) {
		l.deny(errRecursive)
		unix.Close(fd)
		return
	}
	var judge func() error
	if p.mesh() != nil {
		if judge, ok = p.plaintext(&l, fd, dst); !ok {
			return
		}
	}
	src := netip.Addr{}
	if transparent(fd) {
		src = l.src.Addr()
	} else {
		p.sayNoSrc.Do(func() {
			p.config.Log.Warn("the application sees the pod's own address in place of its clients': ENABLE_ORIG_SRC=false, or no CAP_NET_ADMIN in the pod", "pod", p.String())
		})
	}
	p.relayTo(&l, fd, dst, src, judge)
}

// plaintext finds out who calls whom without a tunnel. It returns what policies say
// of that, or false when the connection is refused and has been dealt with.
func (p *Pod) plaintext(l *line, fd int, dst netip.AddrPort) (judge func() error, ok bool) {
	own, err := p.own()
	if err != nil {
		l.deny(err)
		resetFD(fd)
		return nil, false
	}
	m := p.mesh()
	l.dstParty = partyOf(own)
	l.srcParty = partyOf(m.Store.State().WorkloadAt(m.Network, l.src.Addr()))
	peer := workload.Peer{Src: l.src, Dst: dst}
	return func() error { return m.authorize(own, peer) }, true
}

// destination finds out who calls whom. It returns false when the connection is
// none of these, and has been dealt with.
func (p *Pod) destination(l *line, fd int, port uint16) (netip.AddrPort, bool) {
	peer, err := unix.Getpeername(fd)
	if err != nil {
		unix.Close(fd) // it has left already
		return netip.AddrPort{}, false
	}
	l.src = AddrPort(peer)
	dst, redirected, err := OriginalDst(fd)
	if err != nil {
		unix.Close(fd)
		return netip.AddrPort{}, false
	}
	l.dst = dst
	if redirected || dst.Port() != port {
		return dst, true
	}
	// Nobody has redirected it: it was meant for us. To go on would be to call
	// ourselves, for ever.
	if p.unredirected != nil {
		p.unredirected(fd)
		return netip.AddrPort{}, false
	}
	l.deny(errRecursive)
	unix.Close(fd)
	return netip.AddrPort{}, false
}

// transparent tells whether the connection's listener could be made so: then the
// sockets onward can, too.
func transparent(fd int) bool {
	on, err := unix.GetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT)
	return err == nil && on == 1
}

// relayTo connects onward, from src if that is set, and starts the relay between
// the two, if judge, which may be nil, allows it. It takes over fd.
//
// The kernel has completed the client's handshake before we knew of it, so the
// only way to say that the way onward is closed is a reset.
func (p *Pod) relayTo(l *line, fd int, dst netip.AddrPort, src netip.Addr, judge func() error) {
	s := &session{accepted: NewConn(fd), judge: judge}
	// Registered before it is judged: a change in between is not lost.
	if !p.begin(s) {
		s.accepted.reset()
		return
	}
	if judge != nil {
		if err := judge(); err != nil {
			s.accepted.reset()
			p.forget(s)
			l.complete(Counts{}, err)
			return
		}
	}
	l.opened()
	onward, err := p.dial(s, dst, src)
	if err != nil {
		s.accepted.reset()
		p.forget(s)
		l.complete(Counts{}, l.connectError(err))
		return
	}
	p.wg.Add(1)
	Relay(s.accepted, onward, func(c Counts, err error) { p.relayed(l, s, c, err) })
}

// relayed is the end of a relay.
func (p *Pod) relayed(l *line, s *session, c Counts, err error) {
	defer p.wg.Done()
	if cause := s.cause.Load(); cause != nil {
		// The pod ends, and its namespace shall end with it: an orphan that waits
		// for its peer's ACK would keep it.
		err = *cause
		s.accepted.reset()
		s.onward.reset()
	} else {
		closeAfter(s.accepted, err)
		closeAfter(s.onward, err)
	}
	p.forget(s)
	if gone(err) {
		err = nil // as the real one has it: how a peer leaves is its own affair
	}
	l.complete(c, err)
}

// gone tells the errors of a peer that is not there any more.
func gone(err error) bool {
	for _, e := range []unix.Errno{unix.ECONNRESET, unix.EPIPE, unix.ENOTCONN} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// closeAfter closes one end of a relay. If that has broken, the other end shall
// not take the bytes so far for all there were: it is reset, unless that would
// lose some of them.
//
// (The real ztunnel takes a reset for an end, and the client cannot tell.)
func closeAfter(c Conn, err error) {
	unsent := 0
	if err != nil {
		c.control(func(fd int) (err error) {
			unsent, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
			return err
		})
	}
	if err != nil && unsent == 0 {
		c.reset()
		return
	}
	c.Close()
}

// String names the pod in logs.
func (i Identity) String() string {
	if i == (Identity{}) {
		return "unnamed"
	}
	return i.Namespace + "/" + i.Name
}

// osError words an error as the real ztunnel's log does: `Connection refused (os
// error 111)`.
func osError(err error) string {
	if errno := unix.Errno(0); errors.As(err, &errno) {
		text := errno.Error()
		return fmt.Sprintf("%s%s (os error %d)", strings.ToUpper(text[:1]), text[1:], int(errno))
	}
	if se := (*os.SyscallError)(nil); errors.As(err, &se) {
		return se.Err.Error()
	}
	return err.Error()
}
