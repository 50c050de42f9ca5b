package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// sockets is what stands in a pod already.
type sockets struct {
	listening map[uint16]listener // on ztunnel's ports
	open      int                 // connections with others
}

// listener is what is known of a port's listeners, all taken together.
type listener struct {
	wide   bool // one is on another address than loopback
	near   int  // so many are where TPROXY looks: on loopback or the wildcard
	opaque int  // of those, without IP_TRANSPARENT
}

// inetSocket is a socket as sock_diag(7) tells of it.
type inetSocket struct {
	state       byte
	from, to    netip.AddrPort
	orphan      bool // its process has closed it; or nobody has accepted it yet
	transparent Answer
}

// The states of a TCP socket that we ask about (tcp_states.h).
const (
	stateEstablished = 1
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateCloseWait   = 8
	stateListen      = 10

	states = 1<<stateEstablished | 1<<stateFinWait1 | 1<<stateFinWait2 | 1<<stateCloseWait | 1<<stateListen
)

// sockets asks sock_diag(7). A kernel that can't say leaves it empty, as a pod
// where nobody listens yet: both are no reason to refuse.
func (p *pod) sockets() (sockets, error) {
	s := sockets{listening: make(map[uint16]listener)}
	if p.diag == nil {
		return s, nil
	}
	for _, af := range []byte{unix.AF_INET, unix.AF_INET6} {
		messages, err := p.diag.Execute(diagRequest(af))
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
			continue // no tcp_diag, no IPv6
		case err != nil:
			return sockets{}, fmt.Errorf("list the sockets: %w", err)
		}
		for _, m := range messages {
			if sock, ok := parseDiag(m.Data); ok {
				s.count(sock)
			}
		}
	}
	return s, nil
}

// diagRequest asks for a family's TCP sockets: an inet_diag_req_v2 and no filter
// but the states.
func diagRequest(af byte) mdlayher.Message {
	data := make([]byte, 56)
	data[0], data[1] = af, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(data[4:], states)
	return mdlayher.Message{
		Header: mdlayher.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: mdlayher.Request | mdlayher.Dump},
		Data:   data,
	}
}

// parseDiag reads an inet_diag_msg and, of the attributes behind it, the options.
func parseDiag(b []byte) (s inetSocket, ok bool) {
	const (
		size    = 72
		sockopt = 22 // INET_DIAG_SOCKOPT, since Linux 5.10
	)
	if len(b) < size {
		return s, false
	}
	address := func(at int) netip.Addr {
		if b[0] == unix.AF_INET6 {
			return netip.AddrFrom16([16]byte(b[at : at+16])).Unmap()
		}
		return netip.AddrFrom4([4]byte(b[at : at+4]))
	}
	s.state = b[1]
	s.from = netip.AddrPortFrom(address(8), binary.BigEndian.Uint16(b[4:]))
	s.to = netip.AddrPortFrom(address(24), binary.BigEndian.Uint16(b[6:]))
	s.orphan = binary.NativeEndian.Uint32(b[68:]) == 0
	attributes, err := mdlayher.UnmarshalAttributes(b[size:])
	if err != nil {
		return s, true
	}
	for _, a := range attributes {
		if a.Type == sockopt && len(a.Data) > 0 {
			s.transparent = Absent
			if a.Data[0]&transparentBit() != 0 {
				s.transparent = Works
			}
		}
	}
	return s, true
}

// transparentBit is the sixth bit of an inet_diag_sockopt, whose bits C counts
// from the end that the machine's integers begin with.
func transparentBit() byte {
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		return 1 << 2
	}
	return 1 << 5
}

func (s *sockets) count(sock inetSocket) {
	from, to := sock.from.Addr(), sock.to.Addr()
	if sock.state != stateListen {
		// What its process has closed is of no use to anybody any more.
		lost := sock.state != stateEstablished && sock.orphan
		if !to.IsLoopback() && from != to && !lost {
			s.open++
		}
		return
	}
	l := s.listening[sock.from.Port()]
	l.wide = l.wide || !from.IsLoopback()
	if from.IsLoopback() || from.IsUnspecified() {
		l.near++
		if sock.transparent == Absent {
			l.opaque++
		}
	}
	s.listening[sock.from.Port()] = l
}

// reachable refuses listeners that captured packets would not find. Nobody there
// yet is fine.
func (s sockets) reachable(c Config) error {
	for _, p := range []uint16{InboundPort, HBONEPort} {
		l, listens := s.listening[p]
		switch {
		case !listens:
		// Those come to the address of the interface that they came in by.
		case c.Mode == Redirect && !l.wide:
			return fmt.Errorf("port %d %w", p, ErrLoopbackOnly)
		case c.Mode == TProxy && l.near > 0 && l.near == l.opaque:
			return fmt.Errorf("port %d %w", p, ErrOpaque)
		}
	}
	// REDIRECT leads a guest's packets to the virtual interface's address.
	if l, listens := s.listening[OutboundPort]; listens && !l.wide && len(c.VirtualInterfaces) > 0 {
		return fmt.Errorf("port %d %w", OutboundPort, ErrGuests)
	}
	return nil
}
