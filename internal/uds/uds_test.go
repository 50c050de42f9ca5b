package uds_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
	"ambient-emulator/internal/uds"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if path := os.Getenv("UDS_TEST_STARTER"); path != "" {
		starter(path)
	}
	if path := os.Getenv("UDS_TEST_DIAL"); path != "" {
		_, _, err := uds.Dial(context.Background(), "unix", path)
		fmt.Println(err)
		os.Exit(0)
	}
	testmain.Run(m)
}

func listen(t *testing.T, network, path string) *uds.Listener {
	t.Helper()
	l, err := uds.Listen(network, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// stale leaves a socket that nobody listens on.
func stale(t *testing.T, network, path string) {
	t.Helper()
	l, err := net.ListenUnix(network, &net.UnixAddr{Net: network, Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

// The mode is right whatever the umask, and at the first instant: the file is
// watched while it comes and goes a thousand times.
func TestMode(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	path := filepath.Join(t.TempDir(), "s")
	var stop atomic.Bool
	var watcher sync.WaitGroup
	seen := 0
	watcher.Go(func() {
		for !stop.Load() {
			if fi, err := os.Lstat(path); err == nil {
				seen++
				if fi.Mode() != fs.ModeSocket|0o600 {
					t.Errorf("seen with mode %v", fi.Mode())
					return
				}
			}
		}
	})
	for range 1000 {
		l, err := uds.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
	stop.Store(true)
	watcher.Wait()
	if seen == 0 {
		t.Error("the watcher never saw the socket")
	}
}

func TestStaleIsReplaced(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		for _, next := range []string{"unix", "unixpacket"} {
			path := filepath.Join(t.TempDir(), "s")
			stale(t, network, path)
			l := listen(t, next, path)
			conn, peer, err := uds.Dial(context.Background(), next, path)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if int(peer.PID) != os.Getpid() || int(peer.UID) != os.Getuid() {
				t.Errorf("peer %+v", peer)
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		}
	}
}

func TestNothingElseIsReplaced(t *testing.T) {
	dir := t.TempDir()
	p := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.WriteFile(p("file"), []byte("precious"), 0o600),
		os.Mkdir(p("dir"), 0o700),
		os.Symlink("nowhere", p("link")),
		unix.Mkfifo(p("fifo"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	listen(t, "unix", p("alive"))
	listen(t, "unixpacket", p("packet"))
	full(t, p("full"))

	for name, want := range map[string]error{
		"file": uds.ErrNotSocket, "dir": uds.ErrNotSocket, "link": uds.ErrNotSocket, "fifo": uds.ErrNotSocket,
		"alive": uds.ErrInUse, "packet": uds.ErrInUse, "full": uds.ErrInUse,
	} {
		before, err := os.Lstat(p(name))
		if err != nil {
			t.Fatal(err)
		}
		_, err = uds.Listen("unix", p(name))
		if !errors.Is(err, want) || !strings.Contains(err.Error(), p(name)) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		after, err := os.Lstat(p(name))
		if err != nil || !os.SameFile(before, after) {
			t.Errorf("%s is not what it was: %v", name, err)
		}
	}
}

// full makes a living server whose backlog takes nobody any more: connect(2)
// says EAGAIN.
func full(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
}

// Of many processes that race for one stale path, one wins, and its socket is
// the one at the path.
func TestOneStarterWins(t *testing.T) {
	const starters = 12
	for round := range 5 {
		path := filepath.Join(t.TempDir(), "s")
		stale(t, "unix", path)
		type outcome struct {
			cmd *exec.Cmd
			out string
		}
		outcomes := make(chan outcome, starters)
		var release []func() error
		for range starters {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "UDS_TEST_STARTER="+path)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			release = append(release, stdin.Close)
			go func() {
				line := make([]byte, 512)
				n, _ := stdout.Read(line)
				outcomes <- outcome{cmd, string(line[:n])}
			}()
		}
		winner := 0
		var cmds []*exec.Cmd
		for range starters {
			o := <-outcomes
			cmds = append(cmds, o.cmd)
			switch {
			case o.out == "won":
				winner = o.cmd.Process.Pid
			case !strings.Contains(o.out, uds.ErrInUse.Error()):
				t.Errorf("round %d: a loser says %q", round, o.out)
			}
		}
		conn, peer, err := uds.Dial(context.Background(), "unix", path)
		if err != nil || int(peer.PID) != winner {
			t.Errorf("round %d: at the path is %+v (%v), the winner is %d", round, peer, err, winner)
		} else {
			conn.Close()
		}
		for _, r := range release {
			r()
		}
		for _, c := range cmds {
			c.Wait()
		}
		if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
			t.Errorf("round %d: left behind: %v", round, left)
		}
	}
}

// starter is one process of that race: it says how it went and, if it won,
// listens until its stdin ends.
func starter(path string) {
	l, err := uds.Listen("unix", path)
	if err != nil {
		fmt.Print(err)
		os.Exit(1)
	}
	fmt.Print("won")
	os.Stdin.Read(make([]byte, 1))
	l.Close()
	os.Exit(0)
}

func TestCloseRemovesOnlyItsOwn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l := listen(t, "unix", path)
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("somebody else's file is gone: %v", err)
	}
}

func TestBadPaths(t *testing.T) {
	long := "/tmp/" + strings.Repeat("x", 200)
	for path, text := range map[string]string{
		long:                     "shorter",
		"":                       "is empty",
		"@abstract":              "no path",
		"/nonexistent/s":         "no directory /nonexistent: make it first",
		"/proc/self/status/what": "not a directory",
	} {
		if _, err := uds.Listen("unix", path); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("Listen(%q): %v, want %q", path, err, text)
		}
	}
	if _, _, err := uds.Dial(context.Background(), "unix", long); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("Dial: %v", err)
	}
}

// Somebody who sits on the directory's lock can delay a start, not hang it.
func TestLockHeld(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := uds.Listen("unix", filepath.Join(dir, "s")); !errors.Is(err, unix.EWOULDBLOCK) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v", err)
	}
}

func TestDialAdvice(t *testing.T) {
	dir := t.TempDir()
	p := func(name string) string { return filepath.Join(dir, name) }
	stale(t, "unix", p("stale"))
	listen(t, "unixpacket", p("packet"))
	full(t, p("full"))
	if err := os.WriteFile(p("file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"missing": "is the server started",
		"stale":   "start the server again",
		"file":    "that is no socket",
		"packet":  "another protocol",
		"full":    "backlog stayed full",
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		_, _, err := uds.Dial(ctx, "unix", p(name))
		cancel()
		if err == nil || !strings.Contains(err.Error(), text) || !strings.Contains(err.Error(), p(name)) {
			t.Errorf("%s: %v, want %q", name, err, text)
		}
	}
}

// Root hands nothing to a server of another user. This takes a second uid.
func TestServerOfAnotherUserIsNotTrusted(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	exe := copyExe(t)
	os.Chmod(dir, 0o777)
	os.Chmod(filepath.Dir(dir), 0o755)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "UDS_TEST_STARTER="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	stdin, _ := cmd.StdinPipe()
	stdout, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	line := make([]byte, 512)
	if n, _ := stdout.Read(line); string(line[:n]) != "won" {
		t.Fatalf("the other user's server says %q", line[:n])
	}
	if _, _, err := uds.Dial(context.Background(), "unix", path); !errors.Is(err, uds.ErrUntrusted) || !strings.Contains(err.Error(), "uid 65534") {
		t.Errorf("got %v", err)
	}
}

// An ordinary user can't even connect: the mode says no.
func TestClientOfAnotherUserIsKeptOut(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	exe := copyExe(t)
	os.Chmod(dir, 0o777)
	os.Chmod(filepath.Dir(dir), 0o755)
	listen(t, "unix", path)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "UDS_TEST_DIAL="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "run as that user or as root") {
		t.Errorf("%v: %s", err, out)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if !testmain.RealRoot() {
		t.Skip("needs real root: the peer has to be another uid")
	}
}

// copyExe puts this test binary where every user may run it.
func copyExe(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "uds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	exe := filepath.Join(dir, "exe")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return exe
}
