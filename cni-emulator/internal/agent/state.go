package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/cni-emulator/internal/control"
)

// stateVersion is the version of the state file's format.
const stateVersion = 1

// maxState bounds what is read of a state file, in bytes.
const maxState = 64 << 20

// errDamaged says that a state file is not what an agent wrote.
var errDamaged = errors.New("not what an agent wrote")

// memory is what the agent remembers across its own death.
type memory struct {
	BootID string   `json:"bootID"` // cookies mean nothing in another boot
	Pods   []record `json:"pods"`
	// Pods no more, whose rules were not out yet; and pods not yet, whose rules may
	// have been in.
	Leaving []record `json:"leaving,omitempty"`
}

// record is a pod in the state file. A descriptor can't be written down: its
// namespace is opened again from the path, and the cookie tells whether it is the
// one that it was.
type record struct {
	control.PodID
	Watched bool   `json:"watched,omitempty"`
	Inode   uint64 `json:"inode,omitempty"`  // for a person who reads the file
	Cookie  uint64 `json:"cookie,omitempty"` // 0: unknown
}

// document is the file. The sum is of the bytes of State as they stand there.
type document struct {
	Version int             `json:"version"`
	SHA256  string          `json:"sha256"`
	State   json.RawMessage `json:"state"`
}

func encodeState(m memory) ([]byte, error) {
	state, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(state)
	b, err := json.Marshal(document{Version: stateVersion, SHA256: hex.EncodeToString(sum[:]), State: state})
	return append(b, '\n'), err
}

// decodeState believes a file in which everything is right, and no other.
func decodeState(b []byte) (memory, error) {
	var d document
	if err := strict(b, &d); err != nil {
		return memory{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if d.Version != stateVersion {
		return memory{}, fmt.Errorf("%w of this version: it has version %d, %d is known", errDamaged, d.Version, stateVersion)
	}
	if sum := sha256.Sum256(d.State); hex.EncodeToString(sum[:]) != d.SHA256 {
		return memory{}, fmt.Errorf("%w: its checksum is wrong", errDamaged)
	}
	var m memory
	if err := strict(d.State, &m); err != nil {
		return memory{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	for _, r := range m.Leaving {
		if err := checkWords(r.PodID); err != nil {
			return memory{}, fmt.Errorf("%w: %w", errDamaged, err)
		}
	}
	seen := make(map[string]bool)
	for _, r := range m.Pods {
		if err := checkWords(r.PodID); err != nil {
			return memory{}, fmt.Errorf("%w: %w", errDamaged, err)
		}
		if seen[r.UID] {
			return memory{}, fmt.Errorf("%w: it has uid %s twice", errDamaged, r.UID)
		}
		seen[r.UID] = true
	}
	return m, nil
}

// strict decodes one JSON value that has no fields but v's, and nothing after it.
func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows")
	}
	return nil
}

// writeState replaces the file in one step: whoever reads it, after whatever
// crash, finds the old one or the new one, whole (rename(2)).
func writeState(path string, m memory) error {
	b, err := encodeState(m)
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	// Always the same name, and what a crash leaves there goes at the next write.
	// Whatever else lies there goes, too, unopened: a FIFO would hang, a link lead
	// elsewhere. unlink(2) itself, because os.Remove takes directories.
	fresh := path + ".new"
	if err := unix.Unlink(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "unlink", Path: fresh, Err: err}
	}
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		// Before the rename, or a power cut may leave an empty file under the
		// good name.
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(fresh, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// readState reads the file. One that is damaged is moved aside, where a person
// can look at it, and told in aside; the memory is then empty. An error means
// that the agent may not start, because it would overwrite what it could not read.
func readState(path string) (m memory, aside error, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO would hang
	if errors.Is(err, fs.ErrNotExist) {
		return memory{}, nil, nil
	}
	if err != nil {
		return memory{}, nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return memory{}, nil, err
	}
	if !fi.Mode().IsRegular() {
		return memory{}, nil, fmt.Errorf("%s is no regular file; it is left alone: choose another path", path)
	}
	// It decides which namespaces we open: a stranger's is not read.
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return memory{}, nil, fmt.Errorf("%s belongs to uid %d, neither root nor this user; it is left alone: choose another path", path, st.Uid)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return memory{}, nil, err
	}
	if len(b) > maxState {
		aside = fmt.Errorf("%w: it is longer than %d bytes", errDamaged, maxState)
	} else if m, aside = decodeState(b); aside == nil {
		return m, nil, nil
	}
	// The time in the name keeps the next damaged one from replacing it.
	away := path + ".damaged-" + time.Now().UTC().Format("20060102T150405.000000000Z")
	if err := os.Rename(path, away); err != nil {
		return memory{}, nil, fmt.Errorf("%s is %w, and can't be moved aside: %w", path, aside, err)
	}
	return memory{}, fmt.Errorf("%s is %w; it was moved to %s, and the agent starts without pods", path, aside, away), nil
}
