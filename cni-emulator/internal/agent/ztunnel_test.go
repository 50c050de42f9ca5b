package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/zds"
)

// hasty makes an agent that waits for a ztunnel only that long.
func hasty(timeout time.Duration) func(*Agent) {
	return func(a *Agent) { a.timeout = timeout }
}

func (n *node) connected() int {
	n.a.mu.Lock()
	defer n.a.mu.Unlock()
	return len(n.a.ztunnels)
}

// A ztunnel that says nothing is closed, and holds up nobody meanwhile.
func TestSilentPeer(t *testing.T) {
	n := startWith(t, Config{}, hasty(200*time.Millisecond))
	silent := n.dial()
	z := n.ztunnel()
	n.addNow(named("web"), netnstest.New(t))
	if got := z.next(); got != `add uid="uid-web"` {
		t.Errorf("got %s", got)
	}
	z.ack()
	silent.gone()
	n.await(`msg="ztunnel refused: no hello"`)
}

// What is no hello, and what is no answer, ends the connection and nothing else.
func TestGarbage(t *testing.T) {
	for name, hello := range map[string]string{"garbage": "\xff\xff", "long": strings.Repeat("\x08\x01", 600)} {
		t.Run("hello "+name, func(t *testing.T) {
			n := start(t)
			p := n.dial()
			if err := fdpass.Send(p.conn.UnixConn, []byte(hello), fdpass.NoFD); err != nil {
				t.Fatal(err)
			}
			p.gone()
			if n.connected() != 0 {
				t.Error("it counts as connected")
			}
		})
	}
	for name, packet := range map[string]string{
		"garbage": "\xff\xff", "no payload": "\x12\x00", "hello again": "\x08\x01",
		"long": strings.Repeat("\x0a\x00", 513),
	} {
		t.Run("answer "+name, func(t *testing.T) {
			n := start(t)
			p := n.ztunnel()
			added := make(chan error, 1)
			web := netnstest.New(t)
			go func() { _, err := n.add(named("web"), web, patience); added <- err }()
			p.nextAdd("web", web)
			if err := fdpass.Send(p.conn.UnixConn, []byte(packet), fdpass.NoFD); err != nil {
				t.Fatal(err)
			}
			p.gone()
			// The pod is kept, and the verb waits for the next ztunnel.
			if z := n.ztunnel(); z.held[0].ID() != web.ID() {
				t.Error("another namespace in the snapshot")
			}
			if err := <-added; err != nil {
				t.Error(err)
			}
		})
		t.Run("unasked "+name, func(t *testing.T) {
			n := start(t)
			p := n.ztunnel()
			if err := fdpass.Send(p.conn.UnixConn, []byte(packet), fdpass.NoFD); err != nil {
				t.Fatal(err)
			}
			p.gone()
		})
	}
	t.Run("unasked ack", func(t *testing.T) {
		n := start(t)
		p := n.ztunnel()
		p.ack()
		p.gone()
		n.await(ErrUnasked.Error())
	})
	t.Run("descriptor", func(t *testing.T) {
		n := start(t)
		p := n.ztunnel()
		if err := fdpass.Send(p.conn.UnixConn, []byte("\x0a\x00"), netnstest.New(t).FD()); err != nil {
			t.Fatal(err)
		}
		p.gone()
		n.await(zds.ErrWithDescriptor.Error())
	})
}

// Two answers to one message: the second is never taken for the next one's.
func TestTwoAnswers(t *testing.T) {
	n := start(t)
	z := n.ztunnel()
	a, b := netnstest.New(t), netnstest.New(t)
	n.addNow(named("a"), a)
	z.nextAdd("a", a)
	n.addNow(named("b"), b)
	// The lock keeps the agent from going on before both are there.
	n.a.mu.Lock()
	z.ack()
	z.ack()
	n.a.mu.Unlock()
	z.gone()
	n.await(ErrUnasked.Error())
	if pods := n.list(); len(pods["b"].Ztunnels) != 0 || !strings.Contains(pods["b"].LastError, ErrUnasked.Error()) {
		t.Errorf("list: %+v", pods["b"])
	}
}

// An unknown version is named, not refused, as in the real agent.
func TestHelloVersion(t *testing.T) {
	n := start(t)
	p := n.dial()
	if err := fdpass.Send(p.conn.UnixConn, []byte{0x08, 0x07}, fdpass.NoFD); err != nil {
		t.Fatal(err)
	}
	p.expect("snapshot_sent")
	n.await("version=7")
}

// An answer that comes too late is never taken for another one's: the connection
// ends, and the next one starts with a snapshot.
func TestLateAck(t *testing.T) {
	n := startWith(t, Config{}, hasty(100*time.Millisecond))
	z := n.ztunnel()
	a, b := netnstest.New(t), netnstest.New(t)
	added := make(chan error, 2)
	go func() { _, err := n.add(named("a"), a, patience); added <- err }()
	z.nextAdd("a", a)
	go func() { _, err := n.add(named("b"), b, patience); added <- err }()
	z.gone() // though b is queued
	if err := z.conn.Respond(""); err == nil {
		t.Error("there was somebody to take the late ack")
	}
	n.await(ErrLate.Error())
	if e := n.list()["a"].LastError; !strings.Contains(e, ErrLate.Error()) {
		t.Errorf("last error %q", e)
	}
	// In the snapshot a is refused and b acked: each verb hears its own.
	p := n.dial()
	if err := p.conn.SendHello(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if p.next() == `add uid="uid-a"` {
			p.nack("no a")
		} else {
			p.ack()
		}
	}
	errs := []string{fmt.Sprint(<-added), fmt.Sprint(<-added)}
	slices.Sort(errs)
	if errs[0] != "<nil>" || !strings.HasSuffix(errs[1], "says: no a") {
		t.Errorf("add: %q", errs)
	}
	// A nack in the snapshot is skipped.
	p.expect("snapshot_sent")
	p.conn.Close()
	n.await(`msg="ztunnel left" ztunnel=2`)
	if row := n.list()["a"]; !strings.HasSuffix(row.LastError, "no a") {
		t.Errorf("list: %+v", row)
	}
}

// Late in the snapshot, and late for a delete: dropped as well.
func TestLateElsewhere(t *testing.T) {
	n := startWith(t, Config{}, hasty(100*time.Millisecond))
	p := n.dial()
	if err := p.conn.SendHello(); err != nil {
		t.Fatal(err)
	}
	if got := p.next(); got != "snapshot_sent" {
		t.Fatal(got)
	}
	p.gone()

	z := n.ztunnel()
	n.addNow(named("a"), netnstest.New(t))
	z.next()
	z.ack()
	deleted := make(chan error, 1)
	go func() { deleted <- n.del(named("a"), patience) }()
	if got := z.next(); got != `del uid="uid-a"` {
		t.Fatal(got)
	}
	z.gone()
	// It hangs, and may serve the pod all the while: nobody may call it deleted.
	if err := <-deleted; !errors.Is(err, errUnconfirmed) || !strings.Contains(err.Error(), "was dropped (answer to del") {
		t.Error(err)
	}
	if z := n.ztunnel(); len(z.held) != 0 {
		t.Error("the snapshot still has the pod")
	}
}

// One that leaves instead of answering has no pod any more, or hears of that.
func TestLeaveInsteadOfDelete(t *testing.T) {
	n := start(t)
	one, two := n.ztunnel(), n.ztunnel()
	n.addNow(named("a"), netnstest.New(t))
	two.next()
	two.ack()
	deleted := make(chan error, 1)
	go func() { deleted <- n.del(named("a"), patience) }()
	one.next()
	one.close()
	two.expect(`del uid="uid-a"`)
	if err := <-deleted; err != nil {
		t.Error(err)
	}
	// An agent that stops has hung up itself, and knows nothing.
	n.addNow(named("a"), netnstest.New(t))
	two.next()
	two.ack()
	go func() { deleted <- n.del(named("a"), patience) }()
	two.next()
	n.stop()
	if err := <-deleted; err == nil || err.Error() != ErrStopping.Error() {
		t.Error(err)
	}
}

// What the newest leaves unanswered goes to the one that is the newest then.
func TestUnansweredGoToTheHeir(t *testing.T) {
	n := start(t)
	one, two := n.ztunnel(), n.ztunnel()
	a, b := netnstest.New(t), netnstest.New(t)
	added := make(chan error, 2)
	go func() { _, err := n.add(named("a"), a, patience); added <- err }()
	two.nextAdd("a", a)
	go func() { _, err := n.add(named("b"), b, patience); added <- err }()
	eventually(t, "b is queued", func() bool { return len(n.list()) == 2 })
	two.close()
	one.expectAdd("a", a)
	one.expectAdd("b", b)
	if err := errors.Join(<-added, <-added); err != nil {
		t.Error(err)
	}
	n.await("resent=2")
}

// A ztunnel that leaves while it has nothing to do is noticed at once.
func TestIdleLeave(t *testing.T) {
	n := start(t)
	z := n.ztunnel()
	z.close()
	n.await(`msg="ztunnel left" ztunnel=1`)
	if n.connected() != 0 {
		t.Error("it still counts")
	}
}

// A delete's nack reaches the person, and the pod is gone all the same.
func TestDeleteNacked(t *testing.T) {
	n := start(t)
	one, two := n.ztunnel(), n.ztunnel()
	n.addNow(named("a"), netnstest.New(t))
	two.next()
	two.ack()
	deleted := make(chan error, 1)
	go func() { deleted <- n.del(named("a"), patience) }()
	one.next()
	one.nack("will not")
	two.expect(`del uid="uid-a"`)
	if err := <-deleted; err == nil || !strings.HasSuffix(err.Error(), "says: will not") {
		t.Errorf("del: %v", err)
	}
	if len(n.list()) != 0 {
		t.Error("the pod is still there")
	}
}

// The same uid in another namespace replaces, in the same one with other names, too;
// one namespace is one pod.
func TestSameUIDSameNetNS(t *testing.T) {
	n := start(t)
	z := n.ztunnel()
	var wg sync.WaitGroup
	wg.Add(1)
	var mu sync.Mutex
	var seen []string
	go z.acksAll(&wg, func(words string) { mu.Lock(); seen = append(seen, words); mu.Unlock() })
	one, two := netnstest.New(t), netnstest.New(t)
	renamed := named("a")
	renamed.ServiceAccount = "shop"
	for _, err := range []error{
		second(n.add(named("a"), one, patience)),
		second(n.add(renamed, one, patience)),
		second(n.add(named("a"), two, patience)),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	other := named("other")
	if _, err := n.add(other, two, patience); err == nil || !strings.Contains(err.Error(), "belongs to another pod") || !strings.Contains(err.Error(), "default/a (uid uid-a)") {
		t.Errorf("two pods in one namespace: %v", err)
	}
	// The first one's namespace is free again.
	if _, err := n.add(other, one, patience); err != nil {
		t.Error(err)
	}
	z.conn.Close()
	wg.Wait()
	if len(seen) != 5 || seen[1] != `del uid="uid-a"` || !strings.Contains(seen[2], `service_account="shop"`) {
		t.Errorf("ztunnel saw %q", seen)
	}
}

func second(_ []string, err error) error { return err }
