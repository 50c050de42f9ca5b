package inpod

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// The ports of an ambient pod, in the order ztunnel binds them.
const (
	PortInbound            = 15008 // HBONE: what another ztunnel sends
	PortInboundPassthrough = 15006 // captured inbound plaintext
	PortOutbound           = 15001 // captured outbound
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

// listen makes listening sockets at addrs inside ns with open, all or none. The
// caller owns the descriptors; they are non-blocking. An error names the address.
func listen(ns *netns.NS, addrs []netip.AddrPort, open socketFactory) ([]int, netns.Visit, error) {
	fds := make([]int, 0, len(addrs))
	// All of this runs on the thread that is in the pod: a socket belongs, for
	// good, to the namespace of the thread that calls socket(2). Bind and listen
	// could be done from outside, but a port in use is best found in one visit.
	visit, err := ns.Do(func() error {
		for _, addr := range addrs {
			fd, err := open(addr)
			if err != nil {
				return fmt.Errorf("listen on %v: %w", addr, err)
			}
			fds = append(fds, fd)
		}
		return nil
	})
	if err != nil {
		closeAll(fds)
		return nil, visit, err
	}
	return fds, visit, nil
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
	// Connections of an earlier run may linger in TIME_WAIT on the port (tcp(7)).
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("setsockopt SO_REUSEADDR", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("listen", err)
	}
	return fd, nil
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

// closeAll closes fds. A TCP listener's close can't fail in a way that leaves
// it open.
func closeAll(fds []int) error {
	var errs []error
	for _, fd := range fds {
		if err := unix.Close(fd); err != nil {
			errs = append(errs, os.NewSyscallError("close", err))
		}
	}
	return errors.Join(errs...)
}
