package inpod

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// The ports of an ambient pod, in the order ztunnel binds them.
const (
	PortInbound            = proxy.PortInbound
	PortInboundPassthrough = proxy.PortInboundPassthrough
	PortOutbound           = proxy.PortOutbound
)

// Ports lists them.
var Ports = [...]uint16{PortInbound, PortInboundPassthrough, PortOutbound}

// backlog is what Go and the seed ask of listen(2): the kernel's own default
// ceiling, net.core.somaxconn, which is per namespace and cuts it if lower.
const backlog = 4096

// Addrs returns where a pod's listeners are bound in the seed's mode.
func Addrs() []netip.AddrPort {
	addrs := make([]netip.AddrPort, len(Ports))
	for i, port := range Ports {
		addrs[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	}
	return addrs
}

// socket is one of ztunnel's in a pod.
type socket struct {
	fd      int // non-blocking
	port    uint16
	packets bool // UDP
}

// made is the sockets of a pod, and how they were made.
type made struct {
	sockets     []socket // those of DNS first
	visit       netns.Visit
	noLoopback6 bool // the pod has no ::1
}

// listen makes listening sockets at addrs, during a visit, with open, and before
// them those of DNS if openDNS is set: all or none. The caller owns the descriptors. An
// error names the address.
func listen(visit visit, addrs []netip.AddrPort, open socketFactory, openDNS dnsFactory) (m made, err error) {
	m.sockets = make([]socket, 0, len(addrs)+4)
	// All of this runs on the thread that is in the pod: a socket belongs, for
	// good, to the namespace of the thread that calls socket(2). Bind and listen
	// could be done from outside, but a port in use is best found in one visit.
	m.visit, err = visit(func() (err error) {
		if openDNS != nil {
			if m.sockets, m.noLoopback6, err = openDNS(m.sockets); err != nil {
				return err
			}
		}
		for _, addr := range addrs {
			fd, err := open(addr)
			if err != nil {
				return fmt.Errorf("listen on %v: %w", addr, err)
			}
			m.sockets = append(m.sockets, socket{fd: fd, port: addr.Port()})
		}
		return nil
	})
	if err != nil {
		closeAll(m.sockets)
		m.sockets = nil
	}
	return m, err
}

// socketFactory makes a listening socket in the calling thread's namespace. What
// the socket is like depends on the mode; this is the seed's.
type socketFactory func(netip.AddrPort) (int, error)

// listenTCP is socket(2), bind(2), listen(2). Plain TCP: Go's net.Listen would
// make an MPTCP socket, which the real ztunnel does not.
func listenTCP(addr netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err := bindTCP(fd, addr); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func bindTCP(fd int, addr netip.AddrPort) error {
	// Connections of an earlier run may linger in TIME_WAIT on the port (tcp(7)).
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
	}
	// For what rules bring, where they do. Accepted connections inherit both.
	if addr.Port() != PortInbound {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return os.NewSyscallError("setsockopt TCP_NODELAY", err)
		}
		if err := proxy.DefaultKeepAlive().Set(fd); err != nil {
			return err
		}
	}
	// For TPROXY, whose packets are for other addresses than ours (ip(7)), and so
	// that the application may see who calls. It takes CAP_NET_ADMIN; without that
	// the pod is served all the same, and only not captured by TPROXY.
	unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return os.NewSyscallError("listen", unix.Listen(fd, backlog))
}

// loopbackUp tells whether lo is up in the namespace that the socket belongs
// to. A socket answers for its own namespace wherever the caller is
// (netdevice(7)), so this needs no visit.
func loopbackUp(sock int) (bool, error) {
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return false, err
	}
	if err := unix.IoctlIfreq(sock, unix.SIOCGIFFLAGS, ifr); err != nil {
		return false, os.NewSyscallError("ioctl SIOCGIFFLAGS", err)
	}
	return ifr.Uint16()&unix.IFF_UP != 0, nil
}

// closeAll closes sockets. A listener's close can't fail in a way that leaves it
// open.
func closeAll(sockets []socket) error {
	var errs []error
	for _, s := range sockets {
		if err := unix.Close(s.fd); err != nil {
			errs = append(errs, os.NewSyscallError("close", err))
		}
	}
	return errors.Join(errs...)
}
