package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
)

const uuidName = "cni-0b9a6f4e-7d0b-4c7e-9a53-1f2e3d4c5b6a"

// watching returns an agent's configuration, and the directory.
func watching(t *testing.T) (Config, string) {
	cfg := restarting(t)
	cfg.Watch = filepath.Join(t.TempDir(), "above", "netns")
	return cfg, cfg.Watch
}

func mkdir(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
}

// rm is what ip-netns(8) does to delete.
func rm(t *testing.T, path string) {
	t.Helper()
	unix.Unmount(path, unix.MNT_DETACH)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// names waits until these are the pods.
func (n *node) names(want ...string) {
	n.t.Helper()
	set := make(map[string]bool)
	for _, name := range want {
		set[name] = true
	}
	eventually(n.t, fmt.Sprintf("pods %v", want), func() bool {
		n.a.mu.Lock()
		defer n.a.mu.Unlock()
		for _, p := range n.a.pods {
			if !set[p.Name] {
				return false
			}
		}
		return len(n.a.pods) == len(set)
	})
}

func TestWatch(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	early, late := netnstest.New(t), netnstest.New(t)
	nsFile(t, filepath.Join(dir, "early"), early)
	nsFile(t, filepath.Join(dir, uuidName), netnstest.New(t))
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	nsFile(t, filepath.Join(dir, "default"), home)

	n := startWith(t, cfg, nil)
	z := n.ztunnel()
	if len(z.held) != 1 || z.held[0].ID() != early.ID() {
		t.Fatalf("the first snapshot: %v", z.held)
	}
	if !strings.Contains(n.log.String(), ErrNotAPod.Error()) {
		t.Error("the agent's own namespace was passed over in silence")
	}

	// The file comes first, the namespace a while later.
	path := filepath.Join(dir, "late")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// And one that never becomes a namespace.
	if err := os.WriteFile(filepath.Join(dir, "never"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bind(t, path, late)
	words := fmt.Sprintf("add uid=%q", control.DefaultUID("default", "late"))
	z.expect(words)
	if z.held[1].ID() != late.ID() {
		t.Error("late came with another namespace")
	}
	if row := n.list()["late"]; !row.Watched || row.Path != path || row.Namespace != "default" {
		t.Errorf("list: %+v", row)
	}

	rm(t, path)
	z.expect(strings.Replace(words, "add", "del", 1))
	// A new one under the old name is a new pod.
	nsFile(t, path, netnstest.New(t))
	z.expect(words)
	n.await(`waited=1s error="` + filepath.Join(dir, "never") + `: not a network namespace but a regular file"`)
	n.names("early", "late")
}

// What a person made stays when its file goes; what a person deleted stays away.
func TestWatchAndVerbs(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	web, shop := netnstest.New(t), netnstest.New(t)
	n := startWith(t, cfg, nil)
	mine := control.PodID{UID: control.DefaultUID("default", "web"), Name: "web", Namespace: "default", ServiceAccount: "web", Path: "/elsewhere"}
	n.addNow(mine, web)
	nsFile(t, filepath.Join(dir, "web"), web)
	nsFile(t, filepath.Join(dir, "shop"), shop)
	n.names("web", "shop")
	rm(t, filepath.Join(dir, "web"))
	if err := n.del(control.PodID{Name: "shop", Namespace: "default"}, 0); err != nil {
		t.Error(err)
	}
	nsFile(t, filepath.Join(dir, "last"), netnstest.New(t))
	n.names("web", "last")

	// A second name of one namespace waits for the first to go.
	nsFile(t, filepath.Join(dir, "twin"), shop)
	n.names("web", "last", "twin")
	nsFile(t, filepath.Join(dir, "twin2"), shop)
	n.await(ErrTaken.Error())
	rm(t, filepath.Join(dir, "twin"))
	n.names("web", "last", "twin2")
}

// What a person said of a pod stands, whichever came first, the file or he.
func TestWatchLeavesWords(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	n := startWith(t, cfg, nil)
	for _, name := range []string{"before", "after"} {
		ns, path := netnstest.New(t), filepath.Join(dir, name)
		said := control.PodID{UID: control.DefaultUID("default", name), Name: name, Namespace: "default", ServiceAccount: "shop", Path: path}
		if name == "before" {
			n.addNow(said, ns)
		}
		nsFile(t, path, ns)
		n.await("pod=default/" + name)
		// The watcher goes by order: once it has this one it had that one.
		nsFile(t, path+"-next", netnstest.New(t))
		eventually(t, "the next one", func() bool { return n.list()[name+"-next"].Watched })
		if name == "after" {
			n.addNow(said, ns)
		}
		if row := n.list()[name]; row.PodID != said || row.Watched {
			t.Errorf("%s: %+v", name, row)
		}
	}
	// Nor does a restart forget it.
	n.stop()
	n = startWith(t, cfg, nil)
	for _, name := range []string{"before", "after"} {
		if row := n.list()[name]; row.ServiceAccount != "shop" || row.Watched {
			t.Errorf("%s after a restart: %+v", name, row)
		}
		rm(t, filepath.Join(dir, name))
	}
	rm(t, filepath.Join(dir, "after-next"))
	n.names("before", "after", "before-next")
}

// What was kept because it could not be opened is the same pod when it can be.
func TestWatchLeavesWordsOfKept(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	web, path := netnstest.New(t), filepath.Join(dir, "web")
	said := control.PodID{UID: control.DefaultUID("default", "web"), Name: "web", Namespace: "default", ServiceAccount: "shop", Path: path}
	nsFile(t, path, web)
	n := startWith(t, cfg, nil)
	n.addNow(said, web)
	n.stop()
	unbind(t, path)
	n = startWith(t, cfg, nil)
	bind(t, path, web)
	eventually(t, "its namespace is at hand", func() bool { return n.list()["web"].Inode != 0 })
	if row := n.list()["web"]; row.PodID != said || row.Watched {
		t.Errorf("%+v", row)
	}
}

func TestWatchMatch(t *testing.T) {
	cfg, dir := watching(t)
	cfg.Match = "cni-*"
	mkdir(t, dir)
	n := startWith(t, cfg, nil)
	nsFile(t, filepath.Join(dir, "web"), netnstest.New(t))
	nsFile(t, filepath.Join(dir, uuidName), netnstest.New(t))
	n.names(uuidName)
}

func TestRuntimeName(t *testing.T) {
	for name, want := range map[string]bool{
		uuidName: true, strings.ToUpper(uuidName): false, "cni-" + strings.ToUpper(uuidName[4:]): true,
		"cni-web": false, uuidName + "x": false, uuidName[:len(uuidName)-1] + "g": false, strings.ReplaceAll(uuidName, "-", "0"): false, "": false,
	} {
		if got := runtimeName(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}

// A burst of namespaces arrives whole, and so does its end.
func TestWatchBurst(t *testing.T) {
	cfg, dir := watching(t)
	mkdir(t, dir)
	n := startWith(t, cfg, nil)
	z := n.ztunnel()
	var wg sync.WaitGroup
	wg.Add(1)
	seen := make(map[string]int)
	go z.acksAll(&wg, func(words string) { seen[words[:3]]++ })

	const pods = 1000
	spaces := manySpaces(t, pods)
	want := make([]string, pods)
	for i, ns := range spaces {
		want[i] = fmt.Sprintf("pod-%d", i)
		path := filepath.Join(dir, want[i])
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(fdPath(ns), path, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	n.names(want...)
	for _, name := range want {
		rm(t, filepath.Join(dir, name))
	}
	n.names()
	eventually(t, "ztunnel has heard it all", func() bool {
		n.a.mu.Lock()
		defer n.a.mu.Unlock()
		return n.a.ztunnels[0].idle
	})
	z.conn.Close()
	wg.Wait()
	if seen["add"] != pods || seen["del"] != pods {
		t.Errorf("ztunnel saw %v", seen)
	}
}
