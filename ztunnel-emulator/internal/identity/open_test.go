package identity_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ambient-emulator/internal/testmain"
	. "ambient-emulator/ztunnel-emulator/internal/identity"
)

// openerDir tells this binary to be a process that opens the CA directory of that
// name when its standard input ends, and prints the root's hash.
const openerDir = "IDENTITY_TEST_OPEN"

func openerMain(dir string) {
	fmt.Println("up")
	io.Copy(io.Discard, os.Stdin)
	ca, err := OpenCA(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("%x\n", sha256.Sum256(ca.Roots()[0].Raw))
}

type opener struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startOpener(t *testing.T, dir string) *opener {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), openerDir+"="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	o := &opener{cmd, in, bufio.NewReader(out)}
	if line, err := o.out.ReadString('\n'); line != "up\n" {
		t.Fatalf("opener said %q, %v", line, err)
	}
	return o
}

// Processes that start at once on a directory that is not even there share a root.
func TestOpenCARace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "ca")
	var openers []*opener
	for range 6 {
		openers = append(openers, startOpener(t, dir))
	}
	for _, o := range openers {
		o.in.Close()
	}
	roots := make(map[string]bool)
	for _, o := range openers {
		line, _ := o.out.ReadString('\n')
		roots[line] = true
		if err := o.Wait(); err != nil {
			t.Error(err)
		}
	}
	ca, err := OpenCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%x\n", sha256.Sum256(ca.Roots()[0].Raw)); len(roots) != 1 || !roots[want] {
		t.Errorf("the processes have roots %v, and now it is %q", roots, want)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 {
		t.Errorf("left in the directory: %v", entries)
	}
	checkMode(t, dir, 0o700)
	checkMode(t, filepath.Join(dir, KeyFile), 0o600)
	checkMode(t, filepath.Join(dir, RootFile), 0o600)
}

func checkMode(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != want {
		t.Errorf("%s: mode %04o, want %04o", path, st.Mode().Perm(), want)
	}
}

// A starter that is killed, wherever it stood, is in nobody's way.
func TestOpenCAAfterKill(t *testing.T) {
	for _, moment := range []string{"ca", ".new-", KeyFile, RootFile} {
		dir := filepath.Join(t.TempDir(), "ca")
		o := startOpener(t, dir)
		o.in.Close()
		deadline := time.Now().Add(20 * time.Second)
		for !appeared(dir, moment) {
			if time.Now().After(deadline) {
				t.Fatalf("%s never appeared", moment)
			}
		}
		o.Process.Kill()
		o.Wait()
		key, keyErr := os.ReadFile(filepath.Join(dir, KeyFile))
		if _, err := OpenCA(dir); err != nil {
			t.Errorf("after a kill once %s was there: %v", moment, err)
		}
		if now, _ := os.ReadFile(filepath.Join(dir, KeyFile)); keyErr == nil && !bytes.Equal(now, key) {
			t.Errorf("after a kill once %s was there: another key", moment)
		}
	}
}

func appeared(dir, prefix string) bool {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), prefix) {
			return true
		}
	}
	return prefix == "ca"
}

func TestOpenCALeftovers(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	old, young, foreign := filepath.Join(dir, ".new-1"), filepath.Join(dir, ".new-2"), filepath.Join(dir, "mine")
	for _, path := range []string{old, young, foreign} {
		must(t, os.WriteFile(path, []byte("-----BEGIN PRIV"), 0o600))
		must(t, os.Chtimes(path, time.Time{}, time.Now().Add(-time.Hour)))
	}
	must(t, os.Chtimes(young, time.Time{}, time.Now()))
	if _, err := OpenCA(dir); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{old: false, young: true, foreign: true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", path, err == nil, want)
		}
	}
}

// What is there stays there, whatever it is.
func TestOpenCARefuses(t *testing.T) {
	good := filepath.Join(t.TempDir(), "ca")
	if _, err := OpenCA(good); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(good, KeyFile))
	must(t, err)
	cert, err := os.ReadFile(filepath.Join(good, RootFile))
	must(t, err)
	other := filepath.Join(t.TempDir(), "ca")
	if _, err := OpenCA(other); err != nil {
		t.Fatal(err)
	}
	otherCert, err := os.ReadFile(filepath.Join(other, RootFile))
	must(t, err)

	for _, tt := range []struct {
		name  string
		files map[string][]byte
		want  []string
	}{
		{"no key", map[string][]byte{RootFile: cert}, []string{KeyFile + " is not", "put the key back"}},
		{"empty key", map[string][]byte{RootFile: cert, KeyFile: nil}, []string{KeyFile, "no private key in it", "remove"}},
		{"half a key", map[string][]byte{KeyFile: key[:len(key)/2]}, []string{KeyFile, "no private key in it", "remove"}},
		{"half a certificate", map[string][]byte{RootFile: cert[:len(cert)/2], KeyFile: key}, []string{RootFile, "no certificate in it", "remove"}},
		{"another's certificate", map[string][]byte{RootFile: otherCert, KeyFile: key}, []string{RootFile, KeyFile, "belongs to none", "remove both"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "ca")
			must(t, os.Mkdir(dir, 0o700))
			for name, content := range tt.files {
				must(t, os.WriteFile(filepath.Join(dir, name), content, 0o600))
			}
			_, err := OpenCA(dir)
			for _, want := range append(tt.want, dir) {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v\nwant %s", err, want)
				}
			}
			for name, content := range tt.files {
				if now, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(now, content) {
					t.Errorf("%s was changed (%v)", name, err)
				}
			}
		})
	}

	for _, mode := range []os.FileMode{0o750, 0o701, 0o777} {
		must(t, os.Chmod(good, mode))
		if _, err := OpenCA(good); err == nil || !strings.Contains(err.Error(), "chmod 700 "+good) {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
	must(t, os.Chmod(good, 0o700))
	file := filepath.Join(good, RootFile)
	if _, err := OpenCA(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a file: %v", err)
	}

	// A directory of somebody else: to the root of a user namespace of one user,
	// the real root's are.
	foreign := "/"
	if testmain.RealRoot() {
		foreign = good
		must(t, os.Chown(good, 65534, 65534))
	}
	if _, err := OpenCA(foreign); err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
		t.Errorf("somebody else's: %v", err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
