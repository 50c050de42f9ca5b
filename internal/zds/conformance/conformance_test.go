package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	if len(os.Args) > 1 {
		run := map[string]func(){
			"fake-ztunnel": func() { runFakeZtunnel(os.Args[2], os.Args[3]) },
			"fake-agent":   func() { runFakeAgent(os.Args[2], os.Args[3], os.Args[4]) },
			"fake-verb":    func() { runFakeVerb(os.Args[2], os.Args[3], os.Args[4:]) },
		}[os.Args[1]]
		if run != nil {
			// Teleports keep off the main thread, which this goroutine is locked to.
			go run()
			select {}
		}
	}
	testmain.Run(m)
}

func fake(args ...string) []string { return append([]string{os.Args[0]}, args...) }

type try func(context.Context, Options) (*Report, error)

// crowd is how many halves are tested at once: their time passes in waiting.
const crowd = 12

func faithful(t *testing.T, half try, options func(dir string) Options, ps []Promise) {
	t.Helper()
	run := spawn(crowd)
	for _, p := range ps {
		run.add(func() {
			o := options(shortDir(t))
			o.Only, o.Strict = []string{p.ID}, true
			r, err := half(t.Context(), o)
			if err != nil {
				t.Errorf("%s: %v", p.ID, err)
			} else if res := r.Results[0]; res.Status != Kept {
				t.Errorf("%s: %s: %s", p.ID, res.Status, res.Why)
			}
		})
	}
	run.wait()
}

func faulty(t *testing.T, half try, with func(fault string) func(dir string) Options, ps []Promise, faults map[string][]string) {
	t.Helper()
	run := spawn(crowd)
	for _, p := range ps {
		if len(faults[p.ID]) == 0 {
			t.Errorf("%s: a promise that nothing breaks", p.ID)
		}
		for _, fault := range faults[p.ID] {
			run.add(func() {
				o := with(fault)(shortDir(t))
				o.Only, o.Strict = []string{p.ID}, true
				r, err := half(t.Context(), o)
				if err != nil {
					t.Errorf("%s with %s: %v", p.ID, fault, err)
				} else if res := r.Results[0]; res.Status != Broken {
					t.Errorf("%s with %s: %s: %s", p.ID, fault, res.Status, res.Why)
				} else {
					t.Logf("%s with %s: %s", p.ID, fault, res.Why)
				}
			})
		}
	}
	run.wait()
	if len(faults) != len(ps) {
		t.Errorf("faults for %d promises, of which there are %d", len(faults), len(ps))
	}
}

// spawner runs functions, so many at a time.
type spawner struct {
	wg    sync.WaitGroup
	slots chan struct{}
}

func spawn(n int) *spawner { return &spawner{slots: make(chan struct{}, n)} }

func (s *spawner) add(f func()) {
	s.wg.Go(func() {
		s.slots <- struct{}{}
		defer func() { <-s.slots }()
		f()
	})
}

func (s *spawner) wait() { s.wg.Wait() }

// shortDir is a folder whose path is short enough for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "conf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// An improvement that somebody else did not make is not held against them.
func TestDiffers(t *testing.T) {
	o := fakeClient("tight")(shortDir(t))
	o.Only = []string{"hello", "redial-calm"}
	r, err := Client(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Passed(false) || r.Passed(true) || r.Count(Differs) != 1 {
		t.Errorf("%+v", r)
	}
	var table, doc bytes.Buffer
	if err := errors.Join(r.Table(&table), r.JSON(&doc)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"redial-calm  differs", "-> dialled ", "of 2 promises 1 kept, 0 broken, 1 where it differs"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("%q is not in\n%s", want, &table)
		}
	}
	back := new(Report)
	if err := json.Unmarshal(doc.Bytes(), back); err != nil || len(back.Results) != 2 || back.Results[1] != r.Results[1] {
		t.Errorf("%s: %v", &doc, err)
	}
}

// Without the means a promise is not tried, which is no pass of a strict run.
func TestNotTried(t *testing.T) {
	dir := shortDir(t)
	client, err := startProcess(fake("fake-ztunnel", dir+"/zds", ""), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.stop()
	r, err := Client(t.Context(), Options{Path: dir + "/zds", Only: []string{"add", "exit-*"}})
	if err != nil || r.Count(Kept) != 1 || r.Count(NotTried) != 3 || !r.Passed(false) || r.Passed(true) {
		t.Errorf("%+v, %v", r, err)
	}
	if _, ended := client.exited(); ended {
		t.Error("somebody else's client was ended")
	}
	if _, err := Client(t.Context(), Options{Path: dir + "/nobody", Wait: 100 * time.Millisecond}); err == nil {
		t.Error("with no client")
	}
	if _, err := Client(t.Context(), Options{Path: dir + "/x", Only: []string{"nonsense"}}); err == nil {
		t.Error("an id that there is not")
	}
	if _, err := Server(t.Context(), Options{Path: dir + "/nobody", Wait: 100 * time.Millisecond}); err == nil {
		t.Error("with no agent")
	}
}

// A client that somebody else starts again is ended without asking twice.
func TestRestarts(t *testing.T) {
	dir := shortDir(t)
	client, err := startProcess([]string{"sh", "-c", "while true; do " + strings.Join(fake("fake-ztunnel", dir+"/zds", "''"), " ") + "; done"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.stop()
	o := Options{Path: dir + "/zds", Only: []string{"exit-*", "add"}, Restarts: true}
	if r, err := Client(t.Context(), o); err != nil || r.Count(Kept) != 4 {
		t.Errorf("%+v, %v", r, err)
	}
}

// An interrupted run ends at once and leaves nothing behind; testmain looks.
func TestInterrupted(t *testing.T) {
	for _, id := range []string{"idle", "start-retry"} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		dir := shortDir(t)
		start := time.Now()
		o := fakeClient("")(dir)
		o.Only = []string{id}
		_, err := Client(ctx, o)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 4*time.Second {
			t.Errorf("%s: %v after %v", id, err, time.Since(start))
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}
