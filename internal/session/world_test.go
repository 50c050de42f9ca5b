package session

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/testmain"
)

// The layout of the real ztunnel's namespaced tests: reference/localconfig.md,
// section 4.
const worldOfTwo = `NAME    KIND    NODE    ADDRESSES        NETNS
bridge  bridge  -       172.172.0.1      /var/run/netns/world-bridge
node2   node    -       172.172.0.2      /var/run/netns/world-node2
pod2    pod     node2   10.0.2.2         /var/run/netns/world-pod2
pod3    pod     node2   10.0.2.3         /var/run/netns/world-pod3
node3   node    -       172.172.0.3      /var/run/netns/world-node3
pod4    pod     node3   10.0.3.4         /var/run/netns/world-pod4
pod5    pod     node3   10.0.3.5         /var/run/netns/world-pod5
`

func TestWorldCarriesTraffic(t *testing.T) {
	before := machine(t)
	if got := world(t, "up"); got != worldOfTwo {
		t.Errorf("up prints:\n%swant:\n%s", got, worldOfTwo)
	}
	defer world(t, "down")
	reaches(t, "pod2", "10.0.2.2", "pod3", "10.0.2.3") // a neighbour
	reaches(t, "pod2", "10.0.2.2", "pod5", "10.0.3.5") // on the other node
	reaches(t, "node2", "10.0.2.1", "pod2", "10.0.2.2")
	reaches(t, "node2", "172.172.0.2", "pod4", "10.0.3.4")
	reaches(t, "pod4", "10.0.3.4", "node2", "172.172.0.2")
	reaches(t, "bridge", "172.172.0.1", "pod4", "10.0.3.4")
	reaches(t, "world-pod3", "10.0.2.3", "node2", "10.0.2.1")
	routes := world(t, "exec", "pod4", "--", "ip", "-4", "route")
	const want = "default via 10.0.3.1 dev eth0 \n" +
		"10.0.3.0/24 via 10.0.3.1 dev eth0 src 10.0.3.4 \n" +
		"10.0.3.1 dev eth0 scope link src 10.0.3.4 \n"
	if routes != want {
		t.Errorf("pod4's routes:\n%swant:\n%s", routes, want)
	}
	if got := links(machine(t)); got != links(before) {
		t.Errorf("up changed the namespace it ran in:\n%swas:\n%s", got, links(before))
	}
}

func TestWorldCarriesTrafficOfIPv6(t *testing.T) {
	world(t, "up", "--ipv6", "--nodes=3", "--pods", "1")
	defer world(t, "down")
	reaches(t, "pod2", "10.0.2.2", "pod4", "10.0.4.4")
	reaches(t, "pod2", "fd00:10:0:2::2", "pod4", "fd00:10:0:4::4")
	reaches(t, "node3", "fd00:10:0:3::1", "pod3", "fd00:10:0:3::3")
	reaches(t, "node3", "fd00:172:172::3", "pod2", "fd00:10:0:2::2")
	reaches(t, "pod2", "fd00:10:0:2::2", "node3", "fd00:172:172::3")
	reaches(t, "bridge", "fd00:172:172::1", "pod3", "fd00:10:0:3::3")
	world(t, "down")

	world(t, "up", "--ipv6", "--nodes=1")
	reaches(t, "pod2", "fd00:10:0:2::2", "pod3", "fd00:10:0:2::3")
}

// Twice up is one world, twice down is none, and nothing is left of it.
func TestWorldLeavesNoResidue(t *testing.T) {
	before := machine(t)
	world(t, "down")

	// Two at once: one builds, the other waits and finds it built.
	together := exec.Command(worldScript(t), "up")
	if err := together.Start(); err != nil {
		t.Fatal(err)
	}
	first := world(t, "up")
	if err := together.Wait(); err != nil {
		t.Errorf("of two at once: %v", err)
	}
	made := machine(t)
	if second := world(t, "up"); second != first {
		t.Errorf("the second up prints:\n%sthe first:\n%s", second, first)
	}
	if got := machine(t); got != made {
		t.Errorf("the second up changed something:\n%swas:\n%s", got, made)
	}
	refuses(t, 1, "another world is up (nodes=2 pods=2 ipv6=no)", "up", "--ipv6")

	// Another one beside it has the same addresses, and does not mind.
	t.Setenv("WORLD", "world.2")
	world(t, "up", "--nodes=1")
	reaches(t, "pod2", "10.0.2.2", "pod3", "10.0.2.3")
	world(t, "down")
	t.Setenv("WORLD", "world")
	if got := machine(t); got != made {
		t.Errorf("a second world changed the first:\n%swas:\n%s", got, made)
	}

	world(t, "down")
	world(t, "down")
	if got := machine(t); got != before {
		t.Errorf("left behind:\n%swas:\n%s", got, before)
	}
	refuses(t, 1, "no world is up", "ls")
}

// A pod's processes end with it, also one that is deaf to SIGTERM.
func TestWorldEndsWhatRunsInside(t *testing.T) {
	world(t, "up", "--nodes=1", "--pods=1")
	defer world(t, "down")
	var ends []<-chan error
	for _, command := range []string{"echo in; exec tail -f /dev/null", "trap '' TERM; echo in; tail -f /dev/null"} {
		cmd := exec.Command(worldScript(t), "exec", "pod2", "--", "bash", "-c", command)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, len("in\n"))); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		ends = append(ends, ended)
	}
	refuses(t, 1, "itself inside the world", "exec", "pod2", "--", worldScript(t), "down")
	refuses(t, 0, "SIGKILL to process", "down")
	for _, ended := range ends {
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Error("a process outlived its pod")
		}
	}
}

// Ctrl-C while up is at work, wherever it may be: nothing is left.
func TestWorldInterrupted(t *testing.T) {
	before := machine(t)
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		for _, name := range []string{"bridge", "node2", "pod2", "pod3"} {
			up := exec.Command(worldScript(t), "up", "--nodes=1")
			up.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // a terminal tells the whole group
			if err := up.Start(); err != nil {
				t.Fatal(err)
			}
			waitFor(t, name, func() bool { _, err := os.Lstat("/var/run/netns/world-" + name); return err == nil })
			if err := unix.Kill(-up.Process.Pid, sig); err != nil {
				t.Fatal(err)
			}
			err := up.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 128+int(sig) {
				t.Errorf("%v after %s: up ends with %v", sig, name, err)
			}
			if got := machine(t); got != before {
				t.Fatalf("%v after %s: left behind:\n%swas:\n%s", sig, name, got, before)
			}
		}
	}
}

// The same for an up that fails half way.
func TestWorldFailsHalfWay(t *testing.T) {
	before := machine(t)
	ip, err := exec.LookPath("ip")
	if err != nil {
		ip = "/usr/sbin/ip"
	}
	bin := t.TempDir()
	path := os.Getenv("PATH")
	for _, breaks := range []string{"netns attach world-pod3", "-batch -", "-n world-pod2 -batch -", "-n world-bridge -batch -"} {
		fake := fmt.Sprintf("#!/bin/sh\nif [ \"$*\" = %q ] || [ \"$1 $2 $3\" = %q ]; then exit 1; fi\nexec %s \"$@\"\n", breaks, breaks, ip)
		if err := os.WriteFile(filepath.Join(bin, "ip"), []byte(fake), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", bin+":"+path)
		refuses(t, 1, "see above", "up")
		t.Setenv("PATH", path)
		if got := machine(t); got != before {
			t.Fatalf("ip %s: left behind:\n%swas:\n%s", breaks, got, before)
		}
	}
}

// What an up that was killed leaves, is told and can be removed; up does not
// take it for a world.
func TestWorldKilled(t *testing.T) {
	before := machine(t)
	up := exec.Command(worldScript(t), "up")
	up.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := up.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "node2", func() bool {
		ns, err := netns.Open("/var/run/netns/world-node2")
		if err == nil {
			ns.Close()
		}
		return err == nil
	})
	unix.Kill(-up.Process.Pid, unix.SIGKILL)
	up.Wait()
	refuses(t, 1, "half a world is there", "up")
	world(t, "down")
	if got := machine(t); got != before {
		t.Errorf("left behind:\n%swas:\n%s", got, before)
	}
}

// A namespace of somebody else is not touched, whatever its name.
func TestWorldLeavesOthersAlone(t *testing.T) {
	for _, args := range [][]string{{"netns", "add", "world-pod3"}, {"netns", "add", "world-pod99"}, {"netns", "add", "world"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", args, err, out)
		}
		defer exec.Command("ip", "netns", "delete", args[2]).Run()
	}
	before := machine(t)
	refuses(t, 1, "there is a namespace world-pod3 that this script has not made", "up")
	refuses(t, 0, "world-pod3 is left alone", "down")
	refuses(t, 1, "no world is up", "exec", "pod3", "--", "true")
	if got := machine(t); got != before {
		t.Errorf("something has changed:\n%swas:\n%s", got, before)
	}
	world(t, "up", "--nodes=1", "--pods=1")
	refuses(t, 1, "there is no pod99 in this world, only bridge node2 pod2", "exec", "pod99", "--", "true")
	refuses(t, 0, "world-pod99 is left alone", "down")
	if got := machine(t); got != before {
		t.Errorf("something has changed:\n%swas:\n%s", got, before)
	}
}

func TestWorldsWords(t *testing.T) {
	for _, tt := range []struct {
		code int
		says string
		args string
	}{
		{0, "scripts/world up [--nodes 2]", "--help"},
		{0, "Exit codes:", "up --help"},
		{2, "scripts/world up [--nodes 2]", ""},
		{2, `unknown verb "upp"; scripts/world --help tells more`, "upp"},
		{2, `up: unknown word "--pod"`, "up --pod 3"},
		{2, `--nodes is a number from 1 to 15, not "16"`, "up --nodes 16"},
		{2, `--pods is a number from 1 to 253, not ""`, "up --pods"},
		{2, "15 nodes with 20 pods each: there are addresses for 253 pods", "up --nodes=15 --pods=20"},
		{2, `ls: unknown word "pod2"`, "ls pod2"},
		{2, "exec: it goes exec POD -- COMMAND", "exec pod2 ip"},
		{1, "no world is up: scripts/world up", "exec pod2 -- ip --help"},
	} {
		refuses(t, tt.code, tt.says, strings.Fields(tt.args)...)
	}
	world(t, "up", "--nodes=1", "--pods=1")
	defer world(t, "down")
	refuses(t, 7, "", "exec", "pod2", "--", "bash", "-c", "exit 7")
	exec.Command("ip", "netns", "delete", "world-pod2").Run()
	refuses(t, 1, "of the world that is up, pod2 is gone", "up", "--nodes=1", "--pods=1")
	if got := world(t, "ls"); !strings.Contains(got, "gone") {
		t.Errorf("ls does not miss pod2:\n%s", got)
	}
}

// An ordinary user has all this, too, in a private world: the tests above, as
// another user.
func TestOrdinaryUsersWorld(t *testing.T) {
	if !testmain.RealRoot() {
		t.Skip("needs real root: another user has to run it")
	}
	// This user may not see our folders, so there is a tree of his own.
	dir, err := os.MkdirTemp("/tmp", "world")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{
		self: "internal/session/session.test", "go.mod": "go.mod",
		"scripts/private": "scripts/private", "scripts/world": "scripts/world", "scripts/need": "scripts/need",
	} {
		if !filepath.IsAbs(from) {
			from = filepath.Join(testmain.Root(), from)
		}
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		to = filepath.Join(dir, to)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("chown", "-R", "65534:65534", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	as := func(args ...string) *exec.Cmd {
		cmd := exec.Command("setpriv", append([]string{
			"--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
		}, args...)...)
		cmd.Dir = filepath.Join(dir, "internal/session")
		cmd.Env = append(os.Environ(), "PRIVATE_WORLD=", "HOME="+dir, "TMPDIR="+dir)
		return cmd
	}
	out, err := as("../../scripts/world", "up").CombinedOutput()
	if want := "or scripts/private bash -c 'scripts/world up && ...'"; err == nil || !strings.Contains(string(out), want) {
		t.Errorf("outside of a private world: %v: %s, want %s", err, out, want)
	}
	if out, err := as("../../scripts/private", "true").CombinedOutput(); err != nil {
		t.Skipf("no user namespaces here: %s", out)
	}
	out, err = as("./session.test", "-test.run=^TestWorld", "-test.v").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestWorldCarriesTraffic ") {
		t.Errorf("as uid 65534: %v:\n%s", err, out)
	}
}

func worldScript(t *testing.T) string {
	t.Helper()
	return filepath.Join(testmain.Root(), "scripts", "world")
}

// world runs scripts/world, which must go well, and returns its stdout.
func world(t *testing.T, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command(worldScript(t), args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Fatalf("scripts/world %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// refuses runs scripts/world, which must end with code and say says.
func refuses(t *testing.T, code int, says string, args ...string) {
	t.Helper()
	out, err := exec.Command(worldScript(t), args...).CombinedOutput()
	got := 0
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if got != code || !strings.Contains(string(out), says) {
		t.Errorf("scripts/world %s: exit code %d, want %d with %q:\n%s", strings.Join(args, " "), got, code, says, out)
	}
}

// machine is what scripts/world must leave as it was.
func machine(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("bash", "-euc", `
		ls -i /var/run/netns 2>/dev/null || true
		echo ---
		ip -o link
		ip -o addr
		ip rule
		ip -4 route show table all
		ip -6 route show table all
		cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/rp_filter`).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// links is the part of machine that is about the namespace we are in.
func links(machine string) string {
	_, links, _ := strings.Cut(machine, "---\n")
	return links
}

// reaches connects from one place in the world to another, which sees the
// caller's own address.
func reaches(t *testing.T, from, source, to, addr string) {
	t.Helper()
	name := os.Getenv("WORLD")
	if name == "" {
		name = "world"
	}
	ns, err := netns.Open("/var/run/netns/" + name + "-" + to)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	var l *net.TCPListener
	if _, err := ns.Do(func() error {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 8080)))
		return err
	}); err != nil {
		t.Fatalf("in %s: %v", to, err)
	}
	defer l.Close()
	served := make(chan error, 1)
	go answer(l, served)
	got := world(t, "exec", from, "--", "bash", "-c", "cat </dev/tcp/"+addr+"/8080")
	if err := <-served; err != nil || got != source {
		t.Errorf("from %s to %s: %s sees the address %q, want %s (%v)", from, addr, to, got, source, err)
	}
}

// answer tells one caller his address.
func answer(l *net.TCPListener, served chan<- error) {
	l.SetDeadline(time.Now().Add(10 * time.Second))
	conn, err := l.AcceptTCP()
	if err != nil {
		served <- err
		return
	}
	defer conn.Close()
	_, err = fmt.Fprint(conn, conn.RemoteAddr().(*net.TCPAddr).IP)
	served <- err
}
