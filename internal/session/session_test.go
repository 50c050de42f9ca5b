// Package session tests whole command lines of both programs, as a person types
// them, in testdata/*.txtar.
package session

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
	"ambient-emulator/internal/uds"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if _, fake := fakes[filepath.Base(os.Args[0])]; !fake {
		testmain.EnterPrivateWorld()
	}
	testscript.Main(m, fakes)
}

func TestSessions(t *testing.T) {
	bin := build(t)
	testscript.RunT(sequential{t}, testscript.Params{
		Files: files(t),
		Condition: func(cond string) (bool, error) {
			if cond == "realroot" {
				return testmain.RealRoot(), nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", bin+":"+env.Getenv("PATH")+":/usr/sbin:/sbin")
			env.Setenv("BIN", bin)
			env.Setenv("ONE", "\x01") // the seed's one byte
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			if bad, err := exec.LookPath("bad-sender"); err == nil {
				env.Setenv("BAD_SENDER", bad)
			}
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":  cmdExits,
			"await":  cmdAwait,
			"signal": cmdSignal,
			"netns":  cmdNetns,
		},
	})
}

// files lists the scripts, and skips those that need real root where it is not:
// a skip of testscript's own prints the whole script.
func files(t *testing.T) (files []string) {
	t.Helper()
	for _, path := range scripts(t) {
		path = filepath.Join(testmain.Root(), path)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("[!realroot] skip")) && !testmain.RealRoot() {
			t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
				t.Skip("needs real root: another user has to run it")
			})
			continue
		}
		files = append(files, path)
	}
	return files
}

// sequential runs the scripts one after the other: they share /run/netns.
type sequential struct{ *testing.T }

func (sequential) Parallel() {}

func (s sequential) Run(name string, f func(testscript.T)) {
	s.T.Run(name, func(t *testing.T) { f(sequential{t}) })
}

func (s sequential) Verbose() bool { return testing.Verbose() }

// build runs the two literal build commands of the README, with the race
// detector if these tests have it, and returns the folder with the results.
func build(t *testing.T) string {
	t.Helper()
	bin, err := os.MkdirTemp("", "session") // not t.TempDir: other users run them too
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(bin) })
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cni-emulator", "ztunnel-emulator"} {
		args := []string{"build", "-o", filepath.Join(bin, name)}
		if raceEnabled {
			args = append(args, "-race")
		}
		cmd := exec.Command("go", append(args, name+".go")...)
		cmd.Dir = filepath.Join(testmain.Root(), name)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s.go: %v\n%s", name, err, out)
		}
	}
	return bin
}

// exits CODE COMMAND...: the command ends with that exit code.
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// await PATH: something stands at PATH, and if it is a socket somebody listens;
// ! await PATH: nothing stands there.
func cmdAwait(ts *testscript.TestScript, neg bool, args []string) {
	path := args[0]
	if !filepath.IsAbs(path) {
		path = ts.MkAbs(path)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		fi, err := os.Lstat(path)
		if (err != nil) == neg && (neg || fi.Mode().Type() != fs.ModeSocket || listens(path)) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s is there: %v", path, err == nil)
		}
	}
}

// listens tells whether a socket of that name listens. Between bind(2) and
// listen(2) it is there and refuses.
func listens(path string) bool {
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		const acceptcon = "00010000" // __SO_ACCEPTCON, in the column Flags
		if len(f) == 8 && f[3] == acceptcon && filepath.Base(f[7]) == filepath.Base(path) {
			return true
		}
	}
	return false
}

// signal NAME SOCKET: the process that listens on SOCKET gets the signal.
func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	path := ts.MkAbs(args[1])
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
	if errors.Is(err, unix.EPROTOTYPE) {
		conn, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: path})
	}
	ts.Check(err)
	peer, _ := uds.PeerOf(conn) // of whatever user
	conn.Close()
	ts.Check(unix.Kill(int(peer.PID), unix.SignalNum("SIG"+args[0])))
}

// netns NAME...: makes namespaces with lo up, and removes them at the end.
func cmdNetns(ts *testscript.TestScript, neg bool, args []string) {
	for _, name := range args {
		ts.Check(ts.Exec("ip", "netns", "add", name))
		ts.Defer(func() { exec.Command("ip", "netns", "delete", name).Run() })
		ts.Check(ts.Exec("ip", "-n", name, "link", "set", "lo", "up"))
	}
}
