package proxy

import (
	"encoding/binary"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OriginalDst returns where a connection was going before the pod's rules
// redirected it here, or its local address when nothing has: SO_ORIGINAL_DST for
// IPv4, then for IPv6 (the same number at another level), then getsockname(2). A
// connection redirected by TPROXY has its old destination as local address.
// IPv4 in IPv6 is unmapped in every case.
//
// redirected tells whether the two differ. That the option succeeds is not enough:
// it does for every connection that the pod's connection tracking knows.
func OriginalDst(fd int) (addr netip.AddrPort, redirected bool, err error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, false, os.NewSyscallError("getsockname", err)
	}
	local := AddrPort(sa)
	if addr, ok := natDst4(fd); ok {
		return addr, addr != local, nil
	}
	if addr, ok := natDst6(fd); ok {
		return addr, addr != local, nil
	}
	return local, false, nil
}

// soOriginalDst is SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST.
const soOriginalDst = 80

func natDst4(fd int) (netip.AddrPort, bool) {
	// The option's value is a sockaddr_in of 16 bytes; this getter has room for it.
	mreq, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, soOriginalDst)
	if err != nil {
		return netip.AddrPort{}, false
	}
	b := mreq.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), true
}

func natDst6(fd int) (netip.AddrPort, bool) {
	var sa unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(sa))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IPV6, soOriginalDst,
		uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return netip.AddrPort{}, false
	}
	port := (*[2]byte)(unsafe.Pointer(&sa.Port)) // in network order
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), binary.BigEndian.Uint16(port[:])), true
}

// AddrPort takes the address out of a TCP socket's name.
func AddrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
