package proxy

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The ports of spoofed sources: below those that clients take theirs from
// (ip_local_port_range, 32768 and up), and above most that an application listens
// at. See spoof.
const (
	firstSpoofed = 1 << 14
	manySpoofed  = 1 << 14
)

// tries is how many ports are tried.
const tries = 16

// lastSpoofed goes round, so that a port comes back as late as can be. It starts
// anywhere, because those of the ztunnel before may still be known in the pods.
var lastSpoofed = func() *atomic.Uint32 {
	n := new(atomic.Uint32)
	n.Store(rand.Uint32())
	return n
}()

// spoof binds a socket to an address that is somebody else's: the application
// shall see who calls (IP_TRANSPARENT, ip(7)).
//
// The port matters. The pod's connection tracking knows the client's own
// connection as CLIENT:port -> POD:port, redirected to us. If ours had the same
// port the kernel would take it for that one: our packets would come back to us
// instead of reaching the application, or the client's would reach it in the midst
// of ours. With a few thousand clients behind one address that would happen all
// the time, so ours comes from a range that clients do not use. The kernel would
// not choose from it, not even when told to (IP_LOCAL_PORT_RANGE is only heeded
// within the namespace's own range), so we do.
func spoof(fd int, src netip.Addr) error {
	level, transparent, free := unix.SOL_IP, unix.IP_TRANSPARENT, unix.IP_FREEBIND
	if src.Is6() {
		level, transparent, free = unix.SOL_IPV6, unix.IPV6_TRANSPARENT, unix.IPV6_FREEBIND
	}
	if err := unix.SetsockoptInt(fd, level, transparent, 1); err != nil {
		return os.NewSyscallError("setsockopt IP_TRANSPARENT", err)
	}
	if err := unix.SetsockoptInt(fd, level, free, 1); err != nil {
		return os.NewSyscallError("setsockopt IP_FREEBIND", err)
	}
	// One port serves for many destinations, and does not keep the application
	// from listening at it.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
	}
	var err error
	for range tries {
		port := uint16(firstSpoofed + lastSpoofed.Add(1)%manySpoofed)
		err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, port)))
		if err != unix.EADDRINUSE {
			break
		}
	}
	return os.NewSyscallError("bind", err)
}
