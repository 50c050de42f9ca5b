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

// dnsFactory appends the sockets of DNS, made in the calling thread's namespace.
type dnsFactory func([]socket) (all []socket, noLoopback6 bool, err error)

// openDNS makes the four sockets of DNS: UDP and TCP, on 127.0.0.1 and on ::1,
// where a redirected query ends. What was made before an error is in all.
//
// A pod whose lo is down, or whose IPv6 is off, has no ::1, and the real ztunnel
// then fails the whole pod. Here the socket is bound all the same (IPV6_FREEBIND,
// ipv6(7)) and serves from the moment that the address is there. Without IPv6 in
// the kernel IPv4 has to do.
func (c SocketConfig) openDNS(before []socket) (all []socket, noLoopback6 bool, err error) {
	all = before
	ips := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	if c.IPv6 {
		ips = append(ips, netip.IPv6Loopback())
	}
	for _, ip := range ips {
		addr := netip.AddrPortFrom(ip, proxy.PortDNS)
		for _, packets := range []bool{true, false} {
			fd, missing, err := c.dnsSocket(addr, packets)
			noLoopback6 = noLoopback6 || missing
			if ip.Is6() && errors.Is(err, unix.EAFNOSUPPORT) {
				return all, true, nil
			}
			if err != nil {
				return all, noLoopback6, fmt.Errorf("listen for DNS on %v: %w", addr, err)
			}
			all = append(all, socket{fd: fd, port: proxy.PortDNS, packets: packets})
		}
	}
	return all, noLoopback6, nil
}

// dnsSocket makes one. missing tells that the pod does not have the address.
func (c SocketConfig) dnsSocket(addr netip.AddrPort, packets bool) (fd int, missing bool, err error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: [4]byte{127, 0, 0, 1}}
	if addr.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	}
	if packets {
		kind = unix.SOCK_DGRAM
	}
	fd, err = unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, false, os.NewSyscallError("socket", err)
	}
	if missing, err = c.bindDNS(fd, sa, packets); err != nil {
		unix.Close(fd)
		return -1, missing, err
	}
	return fd, missing, nil
}

// bindDNS binds a socket of dnsSocket's.
func (c SocketConfig) bindDNS(fd int, sa unix.Sockaddr, packets bool) (missing bool, err error) {
	if err := c.share(fd, !packets, slog.New(slog.DiscardHandler)); err != nil {
		return false, err
	}
	err = unix.Bind(fd, sa)
	if _, six := sa.(*unix.SockaddrInet6); six && errors.Is(err, unix.EADDRNOTAVAIL) {
		missing = true
		if err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1); err == nil {
			err = unix.Bind(fd, sa)
		}
	}
	if err != nil {
		return missing, os.NewSyscallError("bind", err)
	}
	if !packets {
		err = os.NewSyscallError("listen", unix.Listen(fd, zdsBacklog))
	}
	return missing, err
}
