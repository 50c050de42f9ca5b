package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	proxyproto "github.com/pires/go-proxyproto"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/workload"
)

// mostHandshakes is how many peers of a pod may be in their TLS handshake at once.
// Who connects and says nothing costs a descriptor for ten seconds; a crowd of those
// must not cost all there are.
const mostHandshakes = 512

// inbound serves a connection to 15008, and takes it over: a tunnel.
func (p *Pod) inbound(fd int) {
	if p.handshakes.Add(1) > mostHandshakes {
		p.handshakes.Add(-1)
		resetFD(fd)
		p.sayCrowded.Do(func() {
			p.config.Log.Warn("too many handshakes at once, some are refused", "pod", p.String(), "most", mostHandshakes)
		})
		return
	}
	defer p.handshakes.Add(-1)
	l := line{pod: p, began: time.Now()}
	peer, err := unix.Getpeername(fd)
	if err != nil {
		unix.Close(fd) // it has left already
		return
	}
	local, err := unix.Getsockname(fd)
	if err != nil {
		unix.Close(fd)
		return
	}
	l.src, l.dst = AddrPort(peer), AddrPort(local)
	own, err := p.own()
	if err != nil {
		l.deny(err)
		resetFD(fd)
		return
	}
	r := receiver{pod: p, src: l.src, dst: l.dst, spoof: transparent(fd)}
	t := p.track(NewConn(fd), true)
	if t == nil {
		return
	}
	conn, err := hbone.Accept(p.ctx, t, p.mesh().Identities.ServerConfig(idOf(own)), p.mesh().HBONE)
	if err != nil {
		if p.ctx.Err() == nil {
			l.deny(handshakeError(err))
		}
		return
	}
	t.established(conn)
	if id, ok := identity.PeerID(conn.ConnectionState()); ok {
		r.identity = id.String()
	}
	// The handshake has left a large stack behind; the tunnel lives long.
	p.wg.Add(1)
	go r.serve(conn)
}

// handshakeError words why there is no tunnel.
func handshakeError(err error) error {
	if h := (*hbone.HandshakeError)(nil); errors.As(err, &h) {
		return fmt.Errorf("%s handshake error: %w", h.Step, h.Err)
	}
	return err
}

// receiver is a tunnel that somebody has made to the pod.
type receiver struct {
	pod      *Pod
	src, dst netip.AddrPort
	identity string // of the sender's certificate
	spoof    bool
}

func (r *receiver) serve(conn *hbone.ServerConn) {
	defer r.pod.wg.Done()
	conn.Serve(r.receive)
	conn.Close()
}

// receive serves one CONNECT: who is it, where to, may he, and is there somebody.
func (r *receiver) receive(req *hbone.Request) {
	p, m := r.pod, r.pod.mesh()
	l := &line{pod: p, began: time.Now(), src: r.src, dst: r.dst, mtls: true, hbone: req.Authority}
	refuse := func(status int, err error) {
		l.deny(err)
		req.Respond(status)
	}
	if req.Method != http.MethodConnect {
		refuse(http.StatusBadRequest, fmt.Errorf("invalid method: %s", req.Method))
		return
	}
	own, err := p.own()
	if err != nil {
		refuse(http.StatusServiceUnavailable, err)
		return
	}
	state := m.Store.State()
	target, err := state.InboundTarget(own, m.Network, r.dst.Addr(), req.Authority)
	if err != nil {
		status := http.StatusBadRequest
		if ie := (*workload.InboundError)(nil); errors.As(err, &ie) {
			status = ie.Status
		}
		refuse(status, err)
		return
	}

	l.dstParty = partyOf(own)
	l.srcParty = r.source(state, req)
	l.service = serviceOf(state, own, req, target)

	peer := workload.Peer{Src: r.src, Dst: target.Addr, Identity: r.identity}
	s := &session{judge: func() error { return m.authorize(own, peer) }}
	// Registered before it is judged: a change in between is not lost.
	if !p.begin(s) {
		req.Reset(http2.ErrCodeCancel)
		return
	}
	if err := s.judge(); err != nil {
		p.forget(s)
		req.Respond(http.StatusUnauthorized)
		l.complete(Counts{}, err)
		return
	}
	l.opened()
	app, err := r.dial(s, target)
	if err != nil {
		p.forget(s)
		status := http.StatusServiceUnavailable
		if err == errPolicyChange {
			status = http.StatusUnauthorized
		}
		req.Respond(status)
		l.complete(Counts{}, l.connectError(err))
		return
	}
	stream, err := req.Respond(http.StatusOK, r.responseFields(own)...)
	if err == nil {
		err = p.tunnelled(s, stream)
	}
	if err == nil && target.Proxy {
		err = r.announce(app, target)
	}
	if err != nil {
		if stream != nil {
			stream.Cancel(err)
		}
		app.reset()
		p.forget(s)
		l.complete(Counts{}, s.why(err))
		return
	}
	c, err := stream.Relay(app.File)
	// A line counts from the client's side.
	p.streamed(l, s, app, Counts{Sent: c.Received, Received: c.Sent}, err)
}

// dial connects to the application, as the client if that may be.
func (r *receiver) dial(s *session, target workload.Target) (Conn, error) {
	dst, src := target.Addr, netip.Addr{}
	if r.spoof {
		src = r.src.Addr()
	}
	if target.Proxy && r.pod.mesh().LocalhostAppTunnel {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if dst.Addr().Is6() {
			loopback = netip.IPv6Loopback()
		}
		dst, src = netip.AddrPortFrom(loopback, dst.Port()), netip.Addr{}
	}
	return r.pod.dial(s, dst, src)
}

// announce tells an application that is a proxy itself who calls whom, in a PROXY
// header: the peer of the tunnel, and where he wanted to go.
func (r *receiver) announce(app Conn, target workload.Target) error {
	h := proxyproto.HeaderProxyFromAddrs(2, tcpAddr(r.src), tcpAddr(target.Original))
	if r.identity != "" {
		const tlvIdentity = 0xd0
		if err := h.SetTLVs([]proxyproto.TLV{{Type: tlvIdentity, Value: []byte(r.identity)}}); err != nil {
			return err
		}
	}
	_, err := h.WriteTo(app)
	return err
}

// responseFields describe the pod to who called it.
func (r *receiver) responseFields(own *workload.Workload) []hpack.HeaderField {
	if !r.pod.mesh().ResponseBaggage {
		return nil
	}
	return []hpack.HeaderField{{Name: hbone.HeaderBaggage, Value: own.Baggage()}}
}

// source is who calls, for the access line: whoever has the address, or else what
// he says of himself. On another network the address is another's.
func (r *receiver) source(state *workload.State, req *hbone.Request) party {
	network := r.pod.mesh().Network
	abroad := slices.ContainsFunc(req.Header(hbone.HeaderXForwardedNetwork), func(n string) bool { return !strings.EqualFold(n, network) })
	if w := state.WorkloadAt(network, r.src.Addr()); w != nil && !abroad {
		pt := partyOf(w)
		pt.identity = r.identity
		return pt
	}
	pt := party{identity: r.identity}
	if r.pod.mesh().ResponseBaggage {
		b := workload.ParseBaggage(req.Header(hbone.HeaderBaggage))
		pt.workload, pt.namespace, pt.cluster = b.ServiceName, b.Namespace, b.Cluster
	}
	return pt
}

// serviceOf is the service that was called, for the access line: the one that the
// authority or the client names.
func serviceOf(state *workload.State, own *workload.Workload, req *hbone.Request, target workload.Target) string {
	if target.Service != nil {
		return target.Service.Hostname
	}
	if host := hbone.ForwardedHost(strings.Join(req.Header(hbone.HeaderForwarded), ";")); host != "" {
		if s := state.ServiceFor(host, own.Namespace); s != nil && s.Endpoints[own.UID] != nil {
			return host
		}
	}
	return ""
}
