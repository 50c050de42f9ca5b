package capture

import (
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A pod without lo can't be captured: it is refused, and goes on as it was. With
// lo up it is as good as any.
func TestLoopbackDown(t *testing.T) {
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			n, p, other := newNode(t), pod(t, 2), pod(t, 3)
			p.run(t, "ip", "link", "set", "lo", "down")
			out, err := n.tryAdd(p, "--capture", form)
			if err == nil || !strings.Contains(out, "lo is down in the pod") {
				t.Errorf("add: %v: %s", err, out)
			}
			talk(t, p, other.listen(t, other.ip4, 0))
			talk(t, other, p.listen(t, p.ip4, 0))
			if lines := n.zt.lines(); len(lines) > 0 {
				t.Errorf("access lines: %q", lines)
			}
			p.run(t, "ip", "link", "set", "lo", "up")
			n.add(t, p, "--capture", form)
			talk(t, p, other.listen(t, other.ip4, 0))
			talk(t, other, p.listen(t, p.ip4, 0))
			n.zt.line(t, "outbound")
			n.zt.line(t, "inbound")
		})
	}
}

// A pod whose IPv6 is off, by sysctl, is served over IPv4, DNS and all.
func TestIPv6Off(t *testing.T) {
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			p, other := pod(t, 2), pod(t, 3)
			r := other.resolve(t, false)
			n := newNode(t, resolvConf(t, r))
			p.run(t, "sh", "-c", "for c in all default lo; do echo 1 >/proc/sys/net/ipv6/conf/$c/disable_ipv6; done")
			n.add(t, p, "--capture", form, "--dns-capture")
			n.zt.says(t, "::1")
			talk(t, p, other.listen(t, other.ip4, 0))
			talk(t, other, p.listen(t, p.ip4, 0))
			p.askUDP(t, elsewhere(false), 1)
			p.askTCP(t, elsewhere(false), 2)
			n.zt.line(t, "outbound")
			n.zt.line(t, "inbound")
		})
	}
}

// Somebody else's rules do what they did before, and ours do what they do; del
// leaves theirs as they were.
func TestOthersRules(t *testing.T) {
	counters := regexp.MustCompile(`(?m)^#.*\n|\[\d+:\d+\]`)
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			n, p, other := newNode(t), pod(t, 2), pod(t, 3)
			for _, iptables := range []string{"iptables", "ip6tables"} {
				for _, rule := range []string{
					"-t mangle -A PREROUTING -j MARK --or-mark 0x20000",
					"-t mangle -A OUTPUT -j MARK --or-mark 0x10000",
					"-t nat -A POSTROUTING -o eth0 -j MASQUERADE",
					"-A INPUT -p tcp --dport 7 -j DROP",
					"-A INPUT -m conntrack --ctstate INVALID -j DROP",
					"-A OUTPUT -p tcp --dport 7 -j REJECT --reject-with tcp-reset",
				} {
					p.run(t, iptables, strings.Fields(rule)...)
				}
			}
			theirs := func() string {
				return counters.ReplaceAllString(p.run(t, "iptables-save")+p.run(t, "ip6tables-save"), "")
			}
			before := theirs()
			n.add(t, p, "--capture", form)
			for _, six := range []bool{false, true} {
				talk(t, p, other.listen(t, other.ip(six), 0))
				talk(t, other, p.listen(t, p.ip(six), 0))
				// Seven is forbidden to all in the pod, and so to ztunnel.
				c, err := p.connect(netip.AddrPortFrom(other.ip(six), 7))
				if err == nil {
					hearsReset(t, c)
					c.Close()
				}
			}
			waitFor(t, "four access lines", func() bool { return len(n.zt.lines("info access")) == 4 })
			if got := theirs(); got != before {
				t.Errorf("with ours, theirs are\n%swere\n%s", got, before)
			}
			n.del(t, p)
			if got := theirs(); got != before {
				t.Errorf("after del theirs are\n%swere\n%s", got, before)
			}
			if out, err := exec.Command(filepath.Join(bin, "cni-emulator"), "rules", "show", "--netns", p.path()).CombinedOutput(); err != nil || !strings.Contains(string(out), "nothing is captured here") {
				t.Errorf("after del: %v: %s", err, out)
			}
			talk(t, p, other.listen(t, other.ip4, 0))
		})
	}
}
