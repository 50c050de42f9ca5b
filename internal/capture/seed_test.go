package capture

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/worldtest"
)

// seedNode is a ztunnel in the seed's mode: it listens, and the pods' listeners
// are on loopback.
type seedNode struct {
	zt   *worldtest.Process
	path string
}

func newSeedNode(t *testing.T, under ...string) seedNode {
	t.Helper()
	n := seedNode{path: filepath.Join(t.TempDir(), "zt.sock")}
	command := append(under, worldtest.Ztunnel, n.path)
	n.zt = worldtest.Start(t, netnstest.New(t), nil, command[0], command[1:]...)
	t.Cleanup(func() { n.zt.End(t, unix.SIGTERM) })
	worldtest.WaitFor(t, "the socket", func() bool { return worldtest.Exists(n.path) })
	return n
}

// hand hands a pod over.
func (n seedNode) hand(t *testing.T, p *worldtest.Place) {
	t.Helper()
	worldtest.CNI(t, n.path, p.Path)
}

// The seed's listeners on loopback carry a pod's traffic by tproxy rules; without
// rules, and for what nobody has redirected, they say ok.
func TestSeedsMode(t *testing.T) {
	t.Parallel()
	n, p, other := newSeedNode(t), pod(t, 2), pod(t, 3)
	n.hand(t, p)
	saysOK(t, p)
	talk(t, p, other.Listen(t, other.At(0)))
	talk(t, other, p.Listen(t, p.At(0)))
	if lines := n.zt.Lines(); len(lines) > 0 {
		t.Errorf("access lines without rules: %q", lines)
	}

	worldtest.CNI(t, "rules", "install", "--netns", p.Path, "--capture", "tproxy")
	saysOK(t, p)
	// Outbound: an access line without the pod's name, which nobody has told.
	l := other.Listen(t, other.At(0))
	c := p.Dial(t, l.At)
	s := l.Accept(t)
	c.Say(t, "hello")
	s.Hears(t, "hello")
	if remote(s).Addr() != p.IP4 {
		t.Errorf("the server sees %v, want %v", remote(s), p.IP4)
	}
	c.Close()
	s.HearsEnd(t)
	s.Close()
	want := fmt.Sprintf(`info access connection complete src.addr=%v dst.addr=%v direction="outbound" bytes_sent=5 bytes_recv=0 duration="…"`, local(c), l.At)
	if got := n.zt.Line(t, "outbound"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// Inbound: the application sees who calls.
	l = p.Listen(t, p.At(0))
	c = other.Dial(t, l.At)
	s = l.Accept(t)
	s.Say(t, "hello")
	c.Hears(t, "hello")
	if remote(s).Addr() != other.IP4 {
		t.Errorf("the server sees %v, want %v", remote(s), other.IP4)
	}
	s.Close()
	c.HearsEnd(t)
	c.Close()
	want = fmt.Sprintf(`info access connection complete src.addr=%v dst.addr=%v direction="inbound" bytes_sent=5 bytes_recv=0 duration="…"`, local(c), l.At)
	if got := n.zt.Line(t, "inbound"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// IPv6 is captured, too, and there is no listener for it: it is refused.
	if c, err := p.Connect(other.Listen(t, at(other, true, 0)).At); err == nil {
		c.HearsReset(t)
		c.Close()
	}
	if c, err := other.Connect(p.Listen(t, at(p, true, 0)).At); err == nil {
		c.HearsReset(t)
		c.Close()
	}

	worldtest.CNI(t, "rules", "remove", "--netns", p.Path)
	talk(t, p, other.Listen(t, at(other, true, 0)))
	talk(t, other, p.Listen(t, p.At(0)))
	saysOK(t, p)
}

// With CAP_SYS_ADMIN alone the seed's mode serves as before, and rules are refused,
// because ztunnel could not play its part. Where there are rules already, what they
// capture is reset, and the log says what is missing.
func TestSeedsModeWithLessPrivilege(t *testing.T) {
	t.Parallel()
	n := newSeedNode(t, "setpriv", "--bounding-set=-all,+sys_admin", "--inh-caps=-all")
	p, captured, other := pod(t, 2), pod(t, 2), pod(t, 3)
	l := other.Listen(t, other.At(0))
	n.hand(t, p)
	saysOK(t, p)
	talk(t, p, l)
	if _, err := worldtest.TryCNI("rules", "install", "--netns", p.Path, "--capture", "tproxy"); err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("rules install: %v", err)
	}
	talk(t, p, l)

	worldtest.CNI(t, "rules", "install", "--netns", captured.Path, "--capture", "tproxy")
	n.hand(t, captured)
	c := captured.Dial(t, l.At)
	c.HearsReset(t)
	want := fmt.Sprintf(`error access connection complete src.addr=%v dst.addr=%v direction="outbound" bytes_sent=0 bytes_recv=0 duration="…" error="io error: Operation not permitted (os error 1)"`, local(c), l.At)
	if got := n.zt.Line(t, fmt.Sprintf("src.addr=%v ", local(c))); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if c, err := other.Connect(captured.Listen(t, captured.At(0)).At); err == nil {
		c.HearsReset(t)
	}
}

// saysOK checks what the listeners say to whom nobody has redirected.
func saysOK(t *testing.T, p *worldtest.Place) {
	t.Helper()
	for _, port := range []uint16{15001, 15006, 15008} {
		c := p.Dial(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
		c.Hears(t, "ok\n")
		c.HearsEnd(t)
		c.Close()
	}
}
