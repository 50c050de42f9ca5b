package agent

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/cni-emulator/internal/redirect"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
)

func capturing() Config {
	return Config{Capture: redirect.Config{Mode: redirect.Redirect, IPv6: true}}
}

// capturedAs returns what the pod's rules say of themselves: "capture redirect,
// DNS off, IPv6 on", or "nothing is captured here".
func capturedAs(t testing.TB, ns *netns.NS) string {
	t.Helper()
	text, err := redirect.Show(ns)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(text, "\n")
	_, words, _ := strings.Cut(first, ": ")
	return words
}

const (
	free          = "nothing is captured here"
	byRedirect    = "capture redirect, DNS off, IPv6 on"
	byRedirectDNS = "capture redirect, DNS on, IPv6 on"
	byTProxy      = "capture tproxy, DNS off, IPv6 on"
)

func expectCaptured(t testing.TB, ns *netns.NS, when, want string) {
	t.Helper()
	if got := capturedAs(t, ns); got != want {
		t.Errorf("%s: %s; want %s", when, got, want)
	}
}

// The rules are in before ztunnel hears of the pod, and out after it has let it go.
func TestRulesAroundTheHandover(t *testing.T) {
	n := startWith(t, capturing(), nil)
	z := n.ztunnel()
	web := netnstest.New(t)

	done := make(chan error, 1)
	go func() { _, err := n.add(named("web"), web, patience); done <- err }()
	z.nextAdd("web", web)
	expectCaptured(t, web, "as ztunnel hears of it", byRedirect)
	z.ack()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if p := n.list()["web"]; p.Capture != "redirect" || p.DNSCapture != "false" {
		t.Errorf("list: %+v", p)
	}

	go func() { done <- n.del(named("web"), patience) }()
	if got := z.next(); got != `del uid="uid-web"` {
		t.Fatal(got)
	}
	expectCaptured(t, web, "before ztunnel has let it go", byRedirect)
	z.ack()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	expectCaptured(t, web, "afterwards", free)
}

// A ztunnel that says no leaves the pod closed: to the add, and to the delete.
func TestNackLeavesTheRules(t *testing.T) {
	n := startWith(t, capturing(), nil)
	z := n.ztunnel()
	web := netnstest.New(t)
	done := make(chan error, 1)
	go func() { _, err := n.add(named("web"), web, patience); done <- err }()
	z.nextAdd("web", web)
	z.nack("no")
	if err := <-done; err == nil {
		t.Error("no error")
	}
	expectCaptured(t, web, "after a nack", byRedirect)

	go func() { done <- n.del(named("web"), patience) }()
	z.next()
	z.nack("never")
	if err := <-done; err == nil || !strings.Contains(err.Error(), errRules.Error()) {
		t.Errorf("del: %v", err)
	}
	expectCaptured(t, web, "after a nack to the delete", byRedirect)
}

// A pod that can't be captured is not handed over, and nothing is left in it.
func TestNotCapturedNotHandedOver(t *testing.T) {
	n := startWith(t, capturing(), nil)
	z := n.ztunnel()
	down, web := netnstest.NewLoDown(t), netnstest.New(t)
	if _, err := n.add(named("down"), down, patience); err == nil || !strings.Contains(err.Error(), redirect.ErrLoDown.Error()) {
		t.Errorf("add: %v", err)
	}
	if pods := n.list(); len(pods) != 0 {
		t.Errorf("list: %+v", pods)
	}
	expectCaptured(t, down, "after the failure", free)
	n.addNow(named("web"), web)
	z.expectAdd("web", web) // and nothing before it
}

// Each pod may be captured in its own way, and another one later.
func TestCaptureOfOnePod(t *testing.T) {
	n := startWith(t, capturing(), nil)
	web := netnstest.New(t)
	id := named("web")
	for _, step := range []struct{ capture, dns, want string }{
		{"none", "", free},
		{"tproxy", "", byTProxy},
		{"", "true", byRedirectDNS},
		{"redirect", "false", byRedirect},
		{"none", "true", free},
		{"", "", byRedirect},
	} {
		id.Capture, id.DNSCapture = step.capture, step.dns
		n.addNow(id, web)
		expectCaptured(t, web, step.capture+", DNS "+step.dns, step.want)
	}
	for _, bad := range []control.PodID{{Capture: "some"}, {DNSCapture: "perhaps"}} {
		id.Capture, id.DNSCapture = bad.Capture, bad.DNSCapture
		if _, err := n.add(id, web, 0); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
	expectCaptured(t, web, "after bad words", byRedirect)
	// Another pod's namespace is not touched.
	other := named("other")
	other.Capture = "tproxy"
	if _, err := n.add(other, web, 0); err == nil || !strings.Contains(err.Error(), ErrTaken.Error()) {
		t.Errorf("add: %v", err)
	}
	expectCaptured(t, web, "after another pod's add", byRedirect)
}

// A namespace that its pod has left for another is released.
func TestReplacedIsReleased(t *testing.T) {
	n := startWith(t, capturing(), nil)
	one, two := netnstest.New(t), netnstest.New(t)
	n.addNow(named("web"), one)
	n.addNow(named("web"), two)
	eventually(t, "the first is free", func() bool { return capturedAs(t, one) == free })
	expectCaptured(t, two, "the second", byRedirect)
}

// Who comes back while the rules are taken out finds them in place.
func TestDeletedAndAddedAgain(t *testing.T) {
	n := startWith(t, capturing(), nil)
	web := netnstest.New(t)
	for range 20 {
		n.addNow(named("web"), web)
		if err := n.del(named("web"), 0); err != nil { // does not wait for the rules
			t.Fatal(err)
		}
		n.addNow(named("web"), web)
		expectCaptured(t, web, "added again", byRedirect)
	}
	n.stop()
	expectCaptured(t, web, "after the agent's end", byRedirect)
}

// A pod with open connections is captured all the same; who adds it is told.
func TestOpenConnectionsAreTold(t *testing.T) {
	n := startWith(t, capturing(), nil)
	web := netnstest.New(t)
	for _, address := range []string{"10.9.9.1/32", "10.9.9.2/32"} {
		if out, err := exec.Command("nsenter", "--net="+fdPath(web), "ip", "address", "add", address, "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("add an address: %v: %s", err, out)
		}
	}
	var l net.Listener
	var c net.Conn
	if _, err := web.Do(func() (err error) {
		if l, err = net.Listen("tcp4", "10.9.9.1:7777"); err != nil {
			return err
		}
		from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 9, 9, 2)}}
		c, err = from.Dial("tcp4", "10.9.9.1:7777")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer c.Close()
	notes, err := n.add(named("web"), web, 0)
	if err != nil || len(notes) != 1 || !strings.HasPrefix(notes[0], "2 open connections of the pod will be reset") {
		t.Errorf("add: %q, %v", notes, err)
	}
	n.await("the pod's open connections will be reset at their next packet")
	// Captured already, it has nothing to lose.
	if notes, err := n.add(named("web"), web, 0); err != nil || len(notes) != 0 {
		t.Errorf("add again: %q, %v", notes, err)
	}
}

// The next agent knows what the one before it has captured, and releases it,
// though it captures nothing by itself.
func TestNextAgentReleases(t *testing.T) {
	dir := t.TempDir()
	cfg := capturing()
	cfg.ZDS, cfg.Control, cfg.State = filepath.Join(dir, "z"), filepath.Join(dir, "c"), filepath.Join(dir, "state")
	n := startWith(t, cfg, nil)
	web := netnstest.New(t)
	id := named("web")
	id.Path = fdPath(web)
	n.addNow(id, web)
	n.stop()
	if err := redirect.Remove(web); err != nil { // somebody has flushed them meanwhile
		t.Fatal(err)
	}

	cfg.Capture = redirect.Config{IPv6: true}
	next := startWith(t, cfg, nil)
	expectCaptured(t, web, "at the next start", byRedirect)
	if err := next.del(id, patience); err != nil {
		t.Fatal(err)
	}
	expectCaptured(t, web, "deleted", free)
}

// An agent that dies between a delete and ztunnel's answer has its next one take
// the rules out; but not of a namespace that is a pod's again, or another one.
func TestNextAgentEndsARelease(t *testing.T) {
	for _, then := range []string{"nothing", "added again", "another namespace"} {
		t.Run(then, func(t *testing.T) {
			dir := t.TempDir()
			cfg := capturing()
			cfg.ZDS, cfg.Control, cfg.State = filepath.Join(dir, "z"), filepath.Join(dir, "c"), filepath.Join(dir, "state")
			n := startWith(t, cfg, nil)
			z := n.ztunnel()
			web, path := netnstest.New(t), filepath.Join(dir, "web")
			nsFile(t, path, web)
			id := named("web")
			id.Path = path
			n.addNow(id, web)
			z.expectAdd("web", web)
			if err := n.del(id, 0); err != nil { // on disk, and not answered
				t.Fatal(err)
			}
			z.next()
			want := free
			if then == "added again" {
				n.addNow(id, web)
				want = byRedirect
			}
			atDeath, err := os.ReadFile(cfg.State)
			if err != nil {
				t.Fatal(err)
			}
			n.stop()
			if _, err := redirect.Install(web, cfg.Capture); err != nil { // that was no death
				t.Fatal(err)
			}
			if err := os.WriteFile(cfg.State, atDeath, 0o600); err != nil {
				t.Fatal(err)
			}
			if then == "another namespace" {
				other := netnstest.New(t)
				bind(t, path, other)
				if _, err := redirect.Install(other, cfg.Capture); err != nil {
					t.Fatal(err)
				}
				want = byRedirect
				web = other
			}
			cfg.Capture = redirect.Config{IPv6: true}
			next := startWith(t, cfg, nil)
			expectCaptured(t, web, "at the next start", want)
			next.stop()
			if b, err := os.ReadFile(cfg.State); err != nil || strings.Contains(string(b), "leaving") {
				t.Errorf("state: %s, %v", b, err)
			}
		})
	}
}

// A watched namespace is a pod as soon as its lo is up.
func TestWatchWaitsForLo(t *testing.T) {
	cfg := capturing()
	cfg.Watch = t.TempDir()
	web := netnstest.NewLoDown(t)
	nsFile(t, filepath.Join(cfg.Watch, "web"), web)
	n := startWith(t, cfg, func(a *Agent) {
		if err := a.watcher.arriving["web"].err; !errors.Is(err, redirect.ErrLoDown) || len(a.pods) != 0 {
			t.Errorf("with lo down: %v, %d pods", err, len(a.pods))
		}
	})
	if out, err := exec.Command("nsenter", "--net="+fdPath(web), "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("set lo up: %v: %s", err, out)
	}
	eventually(t, "it is a pod", func() bool { return len(n.list()) == 1 })
	expectCaptured(t, web, "a pod", byRedirect)
}

// A pod that is kept though it could not be captured again is released with its
// delete, too.
func TestDeletedThoughNotAtHand(t *testing.T) {
	cfg := restarting(t)
	cfg.Capture = capturing().Capture
	n := startWith(t, cfg, nil)
	web, path := netnstest.New(t), filepath.Join(t.TempDir(), "web")
	nsFile(t, path, web)
	n.addNow(at("web", path), web)
	n.stop()
	if out, err := exec.Command("nsenter", "--net="+fdPath(web), "ip", "link", "set", "lo", "down").CombinedOutput(); err != nil {
		t.Fatalf("set lo down: %v: %s", err, out)
	}

	next := startWith(t, cfg, nil)
	if p := next.list()["web"]; !strings.Contains(p.LastError, redirect.ErrLoDown.Error()) {
		t.Errorf("list: %+v", p)
	}
	z := next.ztunnel()
	expectCaptured(t, web, "at the next start", byRedirect)
	done := make(chan error, 1)
	go func() { done <- next.del(named("web"), patience) }()
	if got := z.next(); got != `del uid="uid-web"` {
		t.Fatal(got)
	}
	expectCaptured(t, web, "before ztunnel has let it go", byRedirect)
	z.ack()
	if err := <-done; err != nil {
		t.Error(err)
	}
	expectCaptured(t, web, "deleted", free)
}

// An agent that dies when a pod has its rules, and before the pod is written down, has
// its next one take them out: nobody was told that the pod is one.
func TestNextAgentUndoesAnAdd(t *testing.T) {
	cfg := restarting(t)
	cfg.Capture = capturing().Capture
	n := startWith(t, cfg, func(a *Agent) {
		write := a.keeper.write
		a.keeper.write = func(path string, m memory) error {
			if len(m.Pods) > 0 {
				return nil // it is dead by then
			}
			return write(path, m)
		}
	})
	web, path := netnstest.New(t), filepath.Join(t.TempDir(), "web")
	nsFile(t, path, web)
	n.addNow(at("web", path), web)
	n.stop()
	expectCaptured(t, web, "at its death", byRedirect)

	next := startWith(t, cfg, nil)
	if pods := next.list(); len(pods) != 0 {
		t.Errorf("list: %+v", pods)
	}
	expectCaptured(t, web, "at the next start", free)
	// One that does not die leaves no such word.
	next.addNow(at("web", path), web)
	next.stop()
	if b, err := os.ReadFile(cfg.State); err != nil || strings.Contains(string(b), "leaving") {
		t.Errorf("state: %s, %v", b, err)
	}
	expectCaptured(t, web, "after a good end", byRedirect)
}
