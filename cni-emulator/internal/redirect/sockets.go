package redirect

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// sockets is what stands in a pod already.
type sockets struct {
	listening map[uint16]bool // of ztunnel's inbound ports: whether one is not on loopback
	open      int             // connections with others
}

// The states of a TCP socket that we ask about (tcp_states.h).
const (
	stateEstablished = 1
	stateListen      = 10
)

// sockets asks sock_diag(7). A kernel that can't say leaves it empty, as a pod
// where nobody listens yet: both are no reason to refuse.
func (p *pod) sockets() (sockets, error) {
	s := sockets{listening: make(map[uint16]bool)}
	if p.diag == nil {
		return s, nil
	}
	for _, af := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := p.diag.SocketDiagTCP(af)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
			continue // no tcp_diag, no IPv6
		case err != nil && !errors.Is(err, netlink.ErrDumpInterrupted):
			return sockets{}, fmt.Errorf("list the sockets: %w", err)
		}
		for _, sock := range all {
			s.count(sock)
		}
	}
	return s, nil
}

func (s *sockets) count(sock *netlink.Socket) {
	from := sock.ID.Source
	switch sock.State {
	case stateListen:
		if p := sock.ID.SourcePort; p == InboundPort || p == HBONEPort {
			s.listening[p] = s.listening[p] || !from.IsLoopback()
		}
	case stateEstablished:
		if to := sock.ID.Destination; !to.IsLoopback() && !net.IP.Equal(from, to) {
			s.open++
		}
	}
}

// reachable refuses listeners that redirected packets would not find: those come
// to the address of the interface that they came in by. Nobody there yet is fine.
func (s sockets) reachable() error {
	for _, p := range []uint16{InboundPort, HBONEPort} {
		if wide, listens := s.listening[p]; listens && !wide {
			return fmt.Errorf("port %d %w", p, ErrLoopbackOnly)
		}
	}
	return nil
}
