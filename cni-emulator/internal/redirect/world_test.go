package redirect

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
)

// world is a pod P with a remote R behind its eth0, and a guest G behind its tap0.
// Whoever listens answers with its name and with what it sees, so that a client
// knows where it has ended.
type world struct {
	t       *testing.T
	p, r, g *netns.NS
	wide    bool // ztunnel is on the wildcard address in either mode
}

// The addresses, of IPv4 and of IPv6.
type addresses struct{ pod, remote, tap, guest, vip, loopback, probe netip.Addr }

func addressesOf(f family) addresses {
	a := func(four, six string) netip.Addr {
		if f.twin == "" {
			return netip.MustParseAddr(four)
		}
		return netip.MustParseAddr(six)
	}
	return addresses{
		pod: a("10.7.0.2", "fd07::2"), remote: a("10.7.0.1", "fd07::1"),
		tap: a("10.8.0.1", "fd08::1"), guest: a("10.8.0.2", "fd08::2"),
		vip: a("10.99.0.1", "fd99::1"), loopback: f.loopback, probe: f.probe,
	}
}

const (
	appPort = 8080
	// silence is how long a test waits for what must not come.
	silence = 200 * time.Millisecond
)

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, p: netnstest.New(t), r: netnstest.New(t), g: netnstest.New(t)}
	w.veth(w.r, w.p, "eth0")
	w.veth(w.p, w.g, "tap0")
	for _, f := range []family{v4(), v6()} {
		a := addressesOf(f)
		w.address(w.r, "eth0", a.remote)
		w.address(w.r, "lo", a.probe)
		w.address(w.p, "eth0", a.pod)
		w.address(w.p, "tap0", a.tap)
		w.address(w.g, "tap0", a.guest)
		w.route(w.p, "eth0", netip.PrefixFrom(a.remote, 0), a.remote)
		w.route(w.g, "tap0", netip.PrefixFrom(a.tap, 0), a.tap)
		w.route(w.r, "eth0", netip.PrefixFrom(a.tap, a.tap.BitLen()/2).Masked(), a.pod)
	}
	w.sysctl(w.p, "net/ipv4/ip_forward", "1")
	w.sysctl(w.p, "net/ipv6/conf/all/forwarding", "1")
	return w
}

func (w *world) links(ns *netns.NS) *netlink.Handle {
	w.t.Helper()
	p, err := open(ns)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(p.close)
	return p.links
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) veth(a, b *netns.NS, name string) {
	w.t.Helper()
	la, lb := w.links(a), w.links(b)
	w.must(la.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name, PeerNamespace: netlink.NsFd(b.FD())}))
	for _, h := range []*netlink.Handle{la, lb} {
		link, err := h.LinkByName(name)
		w.must(err)
		w.must(h.LinkSetUp(link))
	}
}

// address needs no duplicate address detection, which would take a second.
func (w *world) address(ns *netns.NS, link string, a netip.Addr) {
	w.t.Helper()
	h := w.links(ns)
	l, err := h.LinkByName(link)
	w.must(err)
	bits := a.BitLen()
	if link != "lo" {
		bits -= 8
	}
	flags := 0
	if a.Is6() {
		flags = unix.IFA_F_NODAD
	}
	w.must(h.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}, Flags: flags}))
}

func (w *world) route(ns *netns.NS, link string, to netip.Prefix, via netip.Addr) {
	w.t.Helper()
	h := w.links(ns)
	l, err := h.LinkByName(link)
	w.must(err)
	w.must(h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: to.Masked().Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}, Gw: via.AsSlice()}))
}

// sysctl writes a file that shows each writer its own namespace.
func (w *world) sysctl(ns *netns.NS, name, value string) {
	w.t.Helper()
	_, err := ns.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
	w.must(err)
}

// socketOf makes a socket in a namespace.
type socketOf struct {
	kind        int // SOCK_STREAM or SOCK_DGRAM
	mark        int
	transparent bool
	bind        netip.AddrPort
}

func (s socketOf) in(ns *netns.NS) (fd int, err error) {
	af, level, transparent := unix.AF_INET, unix.SOL_IP, unix.IP_TRANSPARENT
	if s.bind.Addr().Is6() {
		af, level, transparent = unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	_, err = ns.Do(func() (err error) {
		fd, err = unix.Socket(af, s.kind|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, err
	}
	set := func(level, option, value int) {
		if err == nil && value != 0 {
			err = unix.SetsockoptInt(fd, level, option, value)
		}
	}
	set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	set(unix.SOL_SOCKET, unix.SO_MARK, s.mark)
	if af == unix.AF_INET6 {
		set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if s.transparent {
		set(level, transparent, 1)
	}
	if err == nil && (s.bind.Port() != 0 || !s.bind.Addr().IsUnspecified()) {
		err = unix.Bind(fd, sockaddr(s.bind))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// listen makes somebody who answers until the test ends.
func (w *world) listen(ns *netns.NS, name string, s socketOf) {
	w.t.Helper()
	fd, err := s.in(ns)
	w.must(err)
	f := os.NewFile(uintptr(fd), name)
	var wg sync.WaitGroup
	var closer io.Closer
	if s.kind == unix.SOCK_STREAM {
		w.must(unix.Listen(fd, 64))
		l, err := net.FileListener(f)
		w.must(err)
		closer = l
		wg.Go(func() { answerTCP(l, name) })
	} else {
		c, err := net.FilePacketConn(f)
		w.must(err)
		closer = c
		wg.Go(func() { answerUDP(c, name) })
	}
	f.Close()
	w.t.Cleanup(func() { closer.Close(); wg.Wait() })
}

func answerTCP(l net.Listener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		remote, local := c.RemoteAddr().(*net.TCPAddr), c.LocalAddr().(*net.TCPAddr)
		fmt.Fprintf(c, "%s peer=%v local=%v dst=%v", name, remote.IP, local, originalDst(c.(*net.TCPConn)))
		c.Close()
	}
}

func answerUDP(c net.PacketConn, name string) {
	buf := make([]byte, 100)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		c.WriteTo(fmt.Appendf(nil, "%s peer=%v", name, from.(*net.UDPAddr).IP), from)
	}
}

// originalDst is what ztunnel does on 15001 and 15006: SO_ORIGINAL_DST, which has
// the same number for both families, or else the local address.
func originalDst(c *net.TCPConn) (dst netip.AddrPort) {
	dst = c.LocalAddr().(*net.TCPAddr).AddrPort()
	raw, err := c.SyscallConn()
	if err != nil {
		return dst
	}
	raw.Control(func(fd uintptr) {
		const soOriginalDst = 80
		if dst.Addr().Is4() {
			// An ipv6_mreq is as long as a sockaddr_in and four bytes more.
			if m, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst); err == nil {
				b := m.Multiaddr
				dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		// An ipv6_mtuinfo begins with a sockaddr_in6.
		if m, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, soOriginalDst); err == nil {
			port := m.Addr.Port<<8 | m.Addr.Port>>8
			dst = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), port)
		}
	})
	return dst
}

// ask connects, or sends, and returns the answer.
func (w *world) ask(ns *netns.NS, s socketOf, to netip.AddrPort, wait time.Duration) (string, error) {
	if !s.bind.IsValid() {
		s.bind = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		if to.Addr().Is6() {
			s.bind = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
		}
	}
	fd, err := s.in(ns)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(wait.Nanoseconds())
	w.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
	w.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	// From here on an answer counts only if it comes from there.
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		return "", os.NewSyscallError("connect", err)
	}
	if s.kind == unix.SOCK_DGRAM {
		if _, err := unix.Write(fd, []byte("?")); err != nil {
			return "", os.NewSyscallError("write", err)
		}
		buf := make([]byte, 100)
		n, err := unix.Read(fd, buf)
		return string(buf[:max(n, 0)]), os.NewSyscallError("read", err)
	}
	var b strings.Builder
	buf := make([]byte, 300)
	for {
		n, err := unix.Read(fd, buf)
		if n <= 0 {
			return b.String(), os.NewSyscallError("read", err)
		}
		b.Write(buf[:n])
	}
}
