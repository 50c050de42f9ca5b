package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
)

// diagMessage is what the kernel says of a listener, with the attribute
// INET_DIAG_SOCKOPT if options are given.
func diagMessage(af, state byte, from, to netip.AddrPort, inode uint32, options ...byte) []byte {
	b := make([]byte, 72)
	b[0], b[1] = af, state
	binary.BigEndian.PutUint16(b[4:], from.Port())
	binary.BigEndian.PutUint16(b[6:], to.Port())
	copy(b[8:24], from.Addr().AsSlice())
	copy(b[24:40], to.Addr().AsSlice())
	binary.NativeEndian.PutUint32(b[68:], inode)
	if len(options) > 0 {
		b = binary.NativeEndian.AppendUint16(b, uint16(4+len(options)))
		b = binary.NativeEndian.AppendUint16(b, 22)
		b = append(b, options...)
		b = append(b, make([]byte, (4-len(options)%4)%4)...)
	}
	return b
}

func TestParseDiag(t *testing.T) {
	four, six := netip.MustParseAddrPort("127.0.0.1:15006"), netip.MustParseAddrPort("[fd07::2]:15008")
	none4, none6 := netip.MustParseAddrPort("0.0.0.0:0"), netip.MustParseAddrPort("[::]:0")
	mapped := netip.MustParseAddrPort("[::ffff:10.0.0.1]:80")
	for _, tt := range []struct {
		b    []byte
		want inetSocket
	}{
		{diagMessage(unix.AF_INET, stateListen, four, none4, 7), inetSocket{stateListen, four, none4, false, Unknown}},
		{diagMessage(unix.AF_INET, stateListen, four, none4, 7, 0, 0), inetSocket{stateListen, four, none4, false, Absent}},
		{diagMessage(unix.AF_INET6, stateListen, six, none6, 7, transparentBit(), 0), inetSocket{stateListen, six, none6, false, Works}},
		{diagMessage(unix.AF_INET6, stateFinWait2, mapped, mapped, 0), inetSocket{stateFinWait2, netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.1:80"), true, Unknown}},
	} {
		if got, ok := parseDiag(tt.b); !ok || got != tt.want {
			t.Errorf("got %+v, want %+v", got, tt.want)
		}
	}
	if got, ok := parseDiag(make([]byte, 71)); ok {
		t.Errorf("too short, and read as %+v", got)
	}
}

func FuzzParseDiag(f *testing.F) {
	at := netip.MustParseAddrPort("127.0.0.1:15006")
	f.Add(diagMessage(unix.AF_INET, stateListen, at, at, 7, 0x20, 0))
	f.Add(diagMessage(unix.AF_INET6, stateEstablished, at, at, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := parseDiag(b); ok != (len(b) >= 72) || (ok && !s.from.IsValid()) {
			t.Errorf("%d bytes: %+v, %v", len(b), s, ok)
		}
	})
}

// REDIRECT does not reach a listener on loopback, and TPROXY none that is not
// transparent; one on any other address, or none yet, is fine.
func TestListenersOutOfReach(t *testing.T) {
	for _, tt := range []struct {
		bind             string
		transparent      bool
		redirect, tproxy error
	}{
		{"127.0.0.1:15006", true, ErrLoopbackOnly, nil},
		{"127.0.0.1:15006", false, ErrLoopbackOnly, ErrOpaque},
		{"[::1]:15008", true, ErrLoopbackOnly, nil},
		{"[::1]:15008", false, ErrLoopbackOnly, ErrOpaque},
		{"0.0.0.0:15006", true, nil, nil},
		{"0.0.0.0:15006", false, nil, ErrOpaque},
		{"[::]:15008", true, nil, nil},
		{"[::]:15008", false, nil, ErrOpaque},
		{"127.0.0.1:15001", false, nil, nil}, // TPROXY does not lead there
		{"127.0.0.1:8080", false, nil, nil},
	} {
		w := &world{t: t, p: netnstest.New(t)}
		w.listen(w.p, "z", socketOf{kind: unix.SOCK_STREAM, transparent: tt.transparent, bind: netip.MustParseAddrPort(tt.bind)})
		before := state(t, w.p)
		for mode, want := range map[Mode]error{Redirect: tt.redirect, TProxy: tt.tproxy} {
			_, err := Install(w.p, Config{Mode: mode, IPv6: true})
			if !errors.Is(err, want) || (err == nil) != (want == nil) {
				t.Errorf("%s, transparent %v, %s: %v", tt.bind, tt.transparent, mode, err)
			}
			if want == ErrLoopbackOnly && !strings.Contains(fmt.Sprint(err), "tproxy") {
				t.Errorf("%s: %v does not say what to do", tt.bind, err)
			}
			remove(t, w.p)
			same(t, tt.bind+": after", state(t, w.p), before)
		}
	}
	// One that is found is enough.
	w := &world{t: t, p: netnstest.New(t)}
	w.listen(w.p, "a", socketOf{kind: unix.SOCK_STREAM, bind: netip.MustParseAddrPort("[::1]:15006")})
	w.listen(w.p, "b", socketOf{kind: unix.SOCK_STREAM, transparent: true, bind: netip.MustParseAddrPort("127.0.0.1:15006")})
	install(t, w.p, Config{Mode: TProxy, IPv6: true})
	// Guests come by the virtual interface's address, in both modes.
	w.listen(w.p, "c", socketOf{kind: unix.SOCK_STREAM, transparent: true, bind: netip.MustParseAddrPort("127.0.0.1:15001")})
	if _, err := Install(w.p, Config{Mode: TProxy, IPv6: true, VirtualInterfaces: []string{"tap0"}}); !errors.Is(err, ErrGuests) {
		t.Errorf("guests: %v", err)
	}
}

// A connection that one side has ended is open as long as the other may speak.
func TestOpenIsWhatMaySpeak(t *testing.T) {
	w := newWorld(t)
	a := addressesOf(v4())
	stream := socketOf{kind: unix.SOCK_STREAM, bind: netip.AddrPortFrom(a.pod, 0)}
	open := func(want int) {
		t.Helper()
		p, err := open(w.p)
		w.must(err)
		defer p.close()
		if s, err := p.sockets(); err != nil || s.open != want {
			t.Errorf("%d open, %v; want %d", s.open, err, want)
		}
	}
	asks, _ := w.connection(w.p, stream, w.r, netip.AddrPortFrom(a.remote, 9100))
	w.must(unix.Shutdown(asks, unix.SHUT_WR))
	open(1)
	_, answered := w.connection(w.p, stream, w.r, netip.AddrPortFrom(a.remote, 9101))
	w.must(unix.Shutdown(answered, unix.SHUT_WR))
	open(2)
	left, _ := w.connection(w.p, stream, w.r, netip.AddrPortFrom(a.remote, 9102))
	open(3)
	w.must(unix.Dup3(answered, left, unix.O_CLOEXEC)) // closes it, and keeps its number ours
	open(2)
	// The pod with itself: nothing is captured there.
	w.connection(w.p, stream, w.p, netip.AddrPortFrom(a.pod, 9103))
	open(2)
}

// A connection that was there before is counted, and reset by whoever sends first.
func TestOpenConnections(t *testing.T) {
	for _, mode := range []Mode{Redirect, TProxy} {
		w := newWorld(t)
		c := Config{Mode: mode, IPv6: true}
		type end struct {
			what string
			fd   int
		}
		var ends []end
		for _, f := range c.families() {
			w.people(f, c)
			a := addressesOf(f)
			at := netip.AddrPortFrom
			stream := func(to netip.Addr) socketOf { return socketOf{kind: unix.SOCK_STREAM, bind: at(to, 0)} }
			// One that the pod has made, and one that was made to it; each speaks first
			// on one of two.
			for i, first := range []string{"P", "R"} {
				port := uint16(9100 + i)
				out, far := w.connection(w.p, stream(a.pod), w.r, at(a.remote, port))
				far2, in := w.connection(w.r, stream(a.remote), w.p, at(a.pod, port))
				if first == "P" {
					ends = append(ends, end{f.name + ": the pod, on its own", out}, end{f.name + ": the pod, on R's", in})
				} else {
					ends = append(ends, end{f.name + ": R, on the pod's", far}, end{f.name + ": R, on its own", far2})
				}
			}
		}
		report, err := Install(w.p, c)
		if err != nil || report.Open != 8 {
			t.Errorf("%s: %+v, %v", mode, report, err)
		}
		if report, err := Install(w.p, c); err != nil || report.Open != 0 {
			t.Errorf("%s: again: %+v, %v", mode, report, err)
		}
		for _, e := range ends {
			unix.Write(e.fd, []byte("?"))
			if _, err := unix.Read(e.fd, make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s, %s: %v", mode, e.what, err)
			}
		}
	}
}

// connection makes a connection from one to another, both with patience.
func (w *world) connection(from *netns.NS, s socketOf, to *netns.NS, addr netip.AddrPort) (client, server int) {
	w.t.Helper()
	l, err := socketOf{kind: unix.SOCK_STREAM, bind: addr}.in(to)
	w.must(err)
	defer unix.Close(l)
	w.must(unix.Listen(l, 1))
	client, err = s.in(from)
	w.must(err)
	w.t.Cleanup(func() { unix.Close(client) })
	w.must(unix.Connect(client, sockaddr(addr)))
	server, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC)
	w.must(err)
	w.t.Cleanup(func() { unix.Close(server) })
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	w.must(unix.SetsockoptTimeval(client, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	w.must(unix.SetsockoptTimeval(server, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	return client, server
}
