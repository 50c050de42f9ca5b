package agent

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"ambient-emulator/internal/netns/netnstest"
)

// One pod, one ztunnel: the agent's whole life.
func TestAddServeDelete(t *testing.T) {
	n := start(t)
	z := n.ztunnel()
	web := netnstest.New(t)

	added := make(chan error)
	go func() { _, err := n.add(named("web"), web, patience); added <- err }()
	z.nextAdd("web", web)
	select {
	case err := <-added:
		t.Fatalf("add ended before ztunnel answered: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	z.ack()
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	row := n.list()["web"]
	if row.NetNS != web.ID().String() || len(row.Ztunnels) != 1 || row.Ztunnels[0].Nack != "" || row.LastError != "" {
		t.Errorf("list: %+v", row)
	}

	deleted := make(chan error)
	go func() { deleted <- n.del(named("web"), patience) }()
	z.expect(`del uid="uid-web"`)
	if err := <-deleted; err != nil {
		t.Fatal(err)
	}
	if pods := n.list(); len(pods) != 0 {
		t.Errorf("list: %+v", pods)
	}
}

// A ztunnel takes the add of a pod that it serves for a repeat, whatever the names are,
// so one with other names is told to let go first.
func TestAddWithOtherNames(t *testing.T) {
	n := start(t)
	old := n.ztunnel()
	web := netnstest.New(t)
	add := func(account string) chan error {
		id := named("web")
		id.ServiceAccount = account
		added := make(chan error, 1)
		go func() { _, err := n.add(id, web, patience); added <- err }()
		return added
	}
	first := add("sa")
	old.expectAdd("web", web)
	newest := n.ztunnel()
	again := add("sa")
	newest.expectAdd("web", web)
	other := add("other")
	old.expect(`del uid="uid-web"`)
	newest.expect(`del uid="uid-web"`)
	newest.expectAdd("web", web)
	if got := newest.last.GetAdd().GetWorkloadInfo().GetServiceAccount(); got != "other" {
		t.Errorf("after the del came an add of %q", got)
	}
	for _, added := range []chan error{first, again, other} {
		if err := <-added; err != nil {
			t.Error(err)
		}
	}
	if row := n.list()["web"]; row.ServiceAccount != "other" || len(row.Ztunnels) != 1 || row.Ztunnels[0].To != "add" {
		t.Errorf("list: %+v", row)
	}
}

// With no ztunnel the agent keeps the pod, says so, and the next one gets it.
func TestAddWaitsForAZtunnel(t *testing.T) {
	n := start(t)
	web := netnstest.New(t)
	if notes, err := n.add(named("web"), web, time.Millisecond); !errors.Is(err, errUnconfirmed) || len(notes) != 1 || !strings.Contains(notes[0], "no ztunnel is connected") {
		t.Errorf("add: %q, %v", notes, err)
	}
	if notes, err := n.add(named("web"), web, 0); err != nil || len(notes) != 0 {
		t.Errorf("add --no-wait: %q, %v", notes, err)
	}
	added := make(chan error)
	go func() { _, err := n.add(named("web"), web, patience); added <- err }()
	eventually(t, "add waits", func() bool {
		n.a.mu.Lock()
		defer n.a.mu.Unlock()
		return len(n.a.pods["uid-web"].waiters) == 1
	})
	z := n.ztunnel()
	if err := <-added; err != nil {
		t.Error(err)
	}
	if len(z.held) != 1 || z.held[0].ID() != web.ID() {
		t.Errorf("snapshot came with %v", z.held)
	}
}

// A nack is reported in ztunnel's own words, and the pod stays.
func TestNack(t *testing.T) {
	n := start(t)
	z := n.ztunnel()
	web := netnstest.New(t)
	const words = `failure to start proxy : Bind([::]:15008, Os { code: 98, kind: AddrInUse, message: "Address already in use" })`
	added := make(chan error)
	go func() { _, err := n.add(named("web"), web, patience); added <- err }()
	z.nextAdd("web", web)
	z.nack(words)
	if err := <-added; err == nil || !strings.HasSuffix(err.Error(), "says: "+words) {
		t.Errorf("add: %v", err)
	}
	row := n.list()["web"]
	if len(row.Ztunnels) != 1 || row.Ztunnels[0].Nack != words || !strings.HasSuffix(row.LastError, words) || row.LastErrorAt == nil {
		t.Errorf("list: %+v", row)
	}
	// The same again is how one tries again.
	go func() { _, err := n.add(named("web"), web, patience); added <- err }()
	z.expectAdd("web", web)
	if err := <-added; err != nil {
		t.Error(err)
	}
	if row := n.list()["web"]; row.LastError != "" || row.Ztunnels[0].Nack != "" {
		t.Errorf("list: %+v", row)
	}
}

// Adds go to the newest ztunnel, deletes to all; whoever leaves, in whatever order.
func TestTwoZtunnels(t *testing.T) {
	n := start(t)
	one := n.ztunnel()
	two := n.ztunnel()
	three := n.ztunnel()
	a, b := netnstest.New(t), netnstest.New(t)

	done := make(chan error, 1)
	go func() { _, err := n.add(named("a"), a, patience); done <- err }()
	three.expectAdd("a", a)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	two.close() // out of order
	n.await(`msg="ztunnel left" ztunnel=2`)
	three.close()
	n.await(`msg="ztunnel left" ztunnel=3`)
	if row := n.list()["a"]; len(row.Ztunnels) != 0 {
		t.Errorf("acks of a ztunnel that has left: %+v", row)
	}
	go func() { _, err := n.add(named("b"), b, patience); done <- err }()
	one.expectAdd("b", b) // and not a: that was not replayed
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	four := n.dial()
	if err := four.conn.SendHello(); err != nil {
		t.Fatal(err)
	}
	snapshot := []string{four.next()}
	four.ack()
	snapshot = append(snapshot, four.next())
	four.ack()
	slices.Sort(snapshot)
	if want := []string{`add uid="uid-a"`, `add uid="uid-b"`}; !slices.Equal(snapshot, want) {
		t.Errorf("snapshot: %v", snapshot)
	}
	// A delete in the middle of a snapshot comes after it.
	go func() { done <- n.del(named("a"), patience) }()
	one.expect(`del uid="uid-a"`)
	four.expect("snapshot_sent")
	four.expect(`del uid="uid-a"`)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
