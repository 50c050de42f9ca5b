package capture

import (
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/netnstest"
)

// seedNode is a ztunnel in the seed's mode: it listens, and the pods' listeners
// are on loopback.
type seedNode struct {
	zt   *process
	path string
}

func newSeedNode(t *testing.T, under ...string) seedNode {
	t.Helper()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	n := seedNode{path: filepath.Join(t.TempDir(), "zt.sock")}
	command := append(under, filepath.Join(bin, "ztunnel-emulator"), n.path)
	n.zt = start(t, netnstest.New(t), nil, command[0], command[1:]...)
	t.Cleanup(func() { n.zt.end(t, unix.SIGTERM) })
	waitFor(t, "the socket", func() bool { return exists(n.path) })
	return n
}

// hand hands a pod over.
func (n seedNode) hand(t *testing.T, p *place) {
	t.Helper()
	cni(t, n.path, p.path())
}

// cni runs cni-emulator, which must go well.
func cni(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(filepath.Join(bin, "cni-emulator"), args...).CombinedOutput(); err != nil {
		t.Fatalf("cni-emulator %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// The seed's listeners on loopback carry a pod's traffic by tproxy rules; without
// rules, and for what nobody has redirected, they say ok.
func TestSeedsMode(t *testing.T) {
	t.Parallel()
	n, p, other := newSeedNode(t), pod(t, 2), pod(t, 3)
	n.hand(t, p)
	saysOK(t, p)
	talk(t, p, other.listen(t, other.ip4, 0))
	talk(t, other, p.listen(t, p.ip4, 0))
	if lines := n.zt.lines(); len(lines) > 0 {
		t.Errorf("access lines without rules: %q", lines)
	}

	cni(t, "rules", "install", "--netns", p.path(), "--capture", "tproxy")
	saysOK(t, p)
	// Outbound: an access line without the pod's name, which nobody has told.
	l := other.listen(t, other.ip4, 0)
	c := p.dial(t, l.addr)
	s := l.accept(t)
	say(t, c, "hello")
	hears(t, s, "hello")
	if remote(s).Addr() != p.ip4 {
		t.Errorf("the server sees %v, want %v", remote(s), p.ip4)
	}
	c.Close()
	hearsEnd(t, s)
	s.Close()
	want := fmt.Sprintf(`info access connection complete src.addr=%v dst.addr=%v direction="outbound" bytes_sent=5 bytes_recv=0 duration="…"`, local(c), l.addr)
	if got := n.zt.line(t, "outbound"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// Inbound: the application sees who calls.
	l = p.listen(t, p.ip4, 0)
	c = other.dial(t, l.addr)
	s = l.accept(t)
	say(t, s, "hello")
	hears(t, c, "hello")
	if remote(s).Addr() != other.ip4 {
		t.Errorf("the server sees %v, want %v", remote(s), other.ip4)
	}
	s.Close()
	hearsEnd(t, c)
	c.Close()
	want = fmt.Sprintf(`info access connection complete src.addr=%v dst.addr=%v direction="inbound" bytes_sent=5 bytes_recv=0 duration="…"`, local(c), l.addr)
	if got := n.zt.line(t, "inbound"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// IPv6 is captured, too, and there is no listener for it: it is refused.
	if c, err := p.connect(other.listen(t, other.ip6, 0).addr); err == nil {
		hearsReset(t, c)
		c.Close()
	}
	if c, err := other.connect(p.listen(t, p.ip6, 0).addr); err == nil {
		hearsReset(t, c)
		c.Close()
	}

	cni(t, "rules", "remove", "--netns", p.path())
	talk(t, p, other.listen(t, other.ip6, 0))
	talk(t, other, p.listen(t, p.ip4, 0))
	saysOK(t, p)
}

// With CAP_SYS_ADMIN alone the seed's mode serves as before, and rules are refused,
// because ztunnel could not play its part. Where there are rules already, what they
// capture is reset, and the log says what is missing.
func TestSeedsModeWithLessPrivilege(t *testing.T) {
	t.Parallel()
	n := newSeedNode(t, "setpriv", "--bounding-set=-all,+sys_admin", "--inh-caps=-all")
	p, captured, other := pod(t, 2), pod(t, 2), pod(t, 3)
	l := other.listen(t, other.ip4, 0)
	n.hand(t, p)
	saysOK(t, p)
	talk(t, p, l)
	out, err := exec.Command(filepath.Join(bin, "cni-emulator"), "rules", "install", "--netns", p.path(), "--capture", "tproxy").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "CAP_NET_ADMIN") {
		t.Errorf("rules install: %v: %s", err, out)
	}
	talk(t, p, l)

	cni(t, "rules", "install", "--netns", captured.path(), "--capture", "tproxy")
	n.hand(t, captured)
	c := captured.dial(t, l.addr)
	hearsReset(t, c)
	want := fmt.Sprintf(`error access connection complete src.addr=%v dst.addr=%v direction="outbound" bytes_sent=0 bytes_recv=0 duration="…" error="io error: Operation not permitted (os error 1)"`, local(c), l.addr)
	if got := n.zt.line(t, fmt.Sprintf("src.addr=%v ", local(c))); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if c, err := other.connect(captured.listen(t, captured.ip4, 0).addr); err == nil {
		hearsReset(t, c)
	}
}

// saysOK checks what the listeners say to whom nobody has redirected.
func saysOK(t *testing.T, p *place) {
	t.Helper()
	for _, port := range []uint16{15001, 15006, 15008} {
		c := p.dial(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
		hears(t, c, "ok\n")
		hearsEnd(t, c)
		c.Close()
	}
}
