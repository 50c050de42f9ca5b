package capture

import (
	"regexp"
	"strings"
	"testing"

	"ambient-emulator/internal/worldtest"
)

// A pod without lo can't be captured: it is refused, and goes on as it was. With
// lo up it is as good as any.
func TestLoopbackDown(t *testing.T) {
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			n, p, other := newNode(t), pod(t, 2), pod(t, 3)
			p.Run(t, "ip", "link", "set", "lo", "down")
			if err := n.TryAdd(p, "--capture", form); err == nil || !strings.Contains(err.Error(), "lo is down in the pod") {
				t.Errorf("add: %v", err)
			}
			talk(t, p, other.Listen(t, other.At(0)))
			talk(t, other, p.Listen(t, p.At(0)))
			if lines := n.ZT.Lines(); len(lines) > 0 {
				t.Errorf("access lines: %q", lines)
			}
			p.Run(t, "ip", "link", "set", "lo", "up")
			n.Add(t, p, "--capture", form)
			talk(t, p, other.Listen(t, other.At(0)))
			talk(t, other, p.Listen(t, p.At(0)))
			n.ZT.Line(t, "outbound")
			n.ZT.Line(t, "inbound")
		})
	}
}

// A pod whose IPv6 is off, by sysctl, is served over IPv4, DNS and all.
func TestIPv6Off(t *testing.T) {
	for _, form := range forms {
		t.Run(form, func(t *testing.T) {
			t.Parallel()
			p, other := pod(t, 2), pod(t, 3)
			r := resolve(t, other, false)
			n := newNode(t, resolvConf(t, r))
			p.Run(t, "sh", "-c", "for c in all default lo; do echo 1 >/proc/sys/net/ipv6/conf/$c/disable_ipv6; done")
			n.Add(t, p, "--capture", form, "--dns-capture")
			n.ZT.Says(t, "::1")
			talk(t, p, other.Listen(t, other.At(0)))
			talk(t, other, p.Listen(t, p.At(0)))
			askUDP(t, p, elsewhere(false), 1)
			askTCP(t, p, elsewhere(false), 2)
			n.ZT.Line(t, "outbound")
			n.ZT.Line(t, "inbound")
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
					p.Run(t, iptables, strings.Fields(rule)...)
				}
			}
			theirs := func() string {
				return counters.ReplaceAllString(p.Run(t, "iptables-save")+p.Run(t, "ip6tables-save"), "")
			}
			before := theirs()
			n.Add(t, p, "--capture", form)
			for _, six := range []bool{false, true} {
				talk(t, p, other.Listen(t, at(other, six, 0)))
				talk(t, other, p.Listen(t, at(p, six, 0)))
				// Seven is forbidden to all in the pod, and so to ztunnel.
				c, err := p.Connect(at(other, six, 7))
				if err == nil {
					c.HearsReset(t)
					c.Close()
				}
			}
			worldtest.WaitFor(t, "four access lines", func() bool { return len(n.ZT.Lines("info access")) == 4 })
			if got := theirs(); got != before {
				t.Errorf("with ours, theirs are\n%swere\n%s", got, before)
			}
			n.Del(t, p)
			if got := theirs(); got != before {
				t.Errorf("after del theirs are\n%swere\n%s", got, before)
			}
			if out := worldtest.CNI(t, "rules", "show", "--netns", p.Path); !strings.Contains(out, "nothing is captured here") {
				t.Errorf("after del: %s", out)
			}
			talk(t, p, other.Listen(t, other.At(0)))
		})
	}
}
