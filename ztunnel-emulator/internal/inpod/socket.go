package inpod

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// SocketConfig is how ztunnel makes its listeners in pods, in ZDS mode. The
// settings keep the real ones' names and defaults.
type SocketConfig struct {
	IPv6      bool   // IPV6_ENABLED: the wildcard is [::], which takes IPv4 too
	Mark      uint32 // PACKET_MARK: SO_MARK of every socket, 0 for none; rules tell ztunnel's packets by it
	PortReuse bool   // INPOD_PORT_REUSE: SO_REUSEPORT, so that the next ztunnel can bind beside this one
	OrigSrc   *bool  // ENABLE_ORIG_SRC: nil tries IP_TRANSPARENT, true insists, false does without
	DNS       bool   // ISTIO_META_DNS_CAPTURE: serve DNS on 15053 of the pod's loopback

	KeepAlive proxy.KeepAlive // of what is accepted on 15001 and 15006, which inherit it
}

// DefaultMark is the real ztunnel's, which the pods' rules know.
const DefaultMark = 0x539

// zdsBacklog is what the real ztunnel asks of listen(2).
const zdsBacklog = 128

// Addrs returns where a pod's listeners are bound: the wildcard address, because
// redirected connections arrive at the pod's own.
func (c SocketConfig) Addrs() []netip.AddrPort {
	ip := netip.IPv4Unspecified()
	if c.IPv6 {
		ip = netip.IPv6Unspecified()
	}
	addrs := make([]netip.AddrPort, len(Ports))
	for i, port := range Ports {
		addrs[i] = netip.AddrPortFrom(ip, port)
	}
	return addrs
}

// factory returns what makes such listeners.
func (c SocketConfig) factory(log *slog.Logger) socketFactory {
	return func(addr netip.AddrPort) (int, error) {
		family := unix.AF_INET
		if addr.Addr().Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return -1, os.NewSyscallError("socket", err)
		}
		if err := c.prepare(fd, addr, log); err != nil {
			unix.Close(fd)
			return -1, err
		}
		return fd, nil
	}
}

// prepare sets the options, binds and listens. An accepted connection inherits
// all of them; to set them on each would be a dozen system calls.
func (c SocketConfig) prepare(fd int, addr netip.AddrPort, log *slog.Logger) error {
	if err := c.share(fd, true, log); err != nil {
		return err
	}
	// What TPROXY brings to 15006 has the application's own port as its local one, and
	// inherits this: or the application could not bind its port anew while such a
	// connection is there. REDIRECT does not need it.
	if addr.Port() == PortInboundPassthrough {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
		}
	}
	if c.OrigSrc == nil || *c.OrigSrc {
		// The IPv4 option works on a dual-stack socket, too (ip(7)).
		err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		if err != nil && c.OrigSrc != nil {
			return fmt.Errorf("%w; ENABLE_ORIG_SRC=true insists on it", os.NewSyscallError("setsockopt IP_TRANSPARENT", err))
		}
	}

	if port := addr.Port(); port == PortOutbound || port == PortInboundPassthrough {
		if err := c.KeepAlive.Set(fd); err != nil {
			return err
		}
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return os.NewSyscallError("setsockopt TCP_NODELAY", err)
	}

	var sa unix.Sockaddr
	if addr.Addr().Is6() {
		// The node's net.ipv6.bindv6only is not the pod's wish.
		if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return os.NewSyscallError("setsockopt IPV6_V6ONLY", err)
		}
		sa = &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	} else {
		sa = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return os.NewSyscallError("listen", unix.Listen(fd, zdsBacklog))
}

// share marks a socket, and lets the next ztunnel bind beside it; or, if it is a
// listener, where connections of the last one linger.
func (c SocketConfig) share(fd int, listener bool, log *slog.Logger) error {
	if c.Mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(c.Mark)); err != nil {
			return os.NewSyscallError("setsockopt SO_MARK", err)
		}
	}
	// Before bind, or it counts for nothing (socket(7)).
	if c.PortReuse {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			log.Warn("setsockopt SO_REUSEPORT", "error", err)
		}
	} else if listener { // with UDP it would mean that anybody may bind there, too
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
		}
	}
	return nil
}

// ErrNoMark says that this process may not mark its sockets.
var ErrNoMark = errors.New("marking sockets needs CAP_NET_ADMIN, which this process lacks")

// Probe does the harmless version of what prepare will do: it marks a socket
// that nobody uses. It also turns IPv6 off where the kernel has none.
func (c *SocketConfig) Probe() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if c.Mark != 0 {
		err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(c.Mark))
		if errors.Is(err, unix.EPERM) {
			return ErrNoMark
		}
		if err != nil {
			return os.NewSyscallError("setsockopt SO_MARK", err)
		}
	}
	if c.IPv6 {
		six, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		switch {
		case err == nil:
			unix.Close(six)
		case errors.Is(err, unix.EAFNOSUPPORT):
			// The real ztunnel fails each pod instead, until IPV6_ENABLED=false.
			c.IPv6 = false
		default:
			return os.NewSyscallError("socket", err)
		}
	}
	return nil
}
