package workload

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// FileError is what is wrong with a file, and where.
type FileError struct {
	Line int
	At   string // for instance workloads[1].protocol; empty for the file as a whole
	Text string
}

func (e *FileError) Error() string {
	if e.At == "" {
		return fmt.Sprintf("line %d: %s", e.Line, e.Text)
	}
	return fmt.Sprintf("line %d: %s: %s", e.Line, e.At, e.Text)
}

// fileError makes one that fits on a line: what stands in the file may be long,
// and move a terminal's cursor.
func fileError(line int, at, text string) *FileError {
	return &FileError{line, oneLine(at), oneLine(text)}
}

const longestLine = 600 // bytes

func oneLine(s string) string {
	if len(s) > longestLine {
		s = s[:longestLine] + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// decoder walks over a document. The first error stays; after it everything is
// read as if it were empty.
type decoder struct {
	err      error
	warnings []string
	// budget is how many nodes may yet be visited. Without aliases each is visited
	// once at most; an alias can make a small file as large as it likes.
	budget int
}

// path is where in the document we are. It is put into words only for an error.
type path struct {
	up   *path
	key  string // or, in a list, empty
	item int
}

func (p *path) String() string {
	switch {
	case p == nil:
		return ""
	case p.key == "":
		return fmt.Sprintf("%s[%d]", p.up, p.item)
	case p.up == nil:
		return p.key
	}
	return p.up.String() + "." + p.key
}

func (d *decoder) fail(n *yaml.Node, at *path, format string, args ...any) {
	if d.err == nil {
		d.err = fileError(n.Line, at.String(), fmt.Sprintf(format, args...))
	}
}

func (d *decoder) warn(n *yaml.Node, at *path, format string, args ...any) {
	if len(d.warnings) < maxWarnings {
		d.warnings = append(d.warnings, fileError(n.Line, at.String(), fmt.Sprintf(format, args...)).Error())
	}
}

// maxWarnings keeps a large file with one habit from filling the log.
const maxWarnings = 20

// visit returns the node behind an alias, or false when there is nothing more to
// be read.
func (d *decoder) visit(n *yaml.Node, at *path) (*yaml.Node, bool) {
	if d.err != nil {
		return n, false
	}
	if d.budget--; d.budget < 0 {
		d.fail(n, at, "the aliases (*name) make the file too large; write less with them")
		return n, false
	}
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n, true
}

// blank tells whether nothing stands where a value could. Nothing is an empty
// list, an empty map, and the absence of what may be absent.
func blank(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Value == "" && n.Style == 0
}

// describe is for errors: what a node is, not what it should be.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a map"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		if blank(n) {
			return "nothing"
		}
		return strconv.Quote(n.Value)
	}
	return "something else"
}

// text returns a scalar as it is written: 123 and true are strings too, as in the
// real one's parser.
func (d *decoder) text(n *yaml.Node, at *path) string {
	n, ok := d.visit(n, at)
	if !ok {
		return ""
	}
	if n.Kind != yaml.ScalarNode {
		d.fail(n, at, "%s where a string belongs", describe(n))
		return ""
	}
	if tag := n.ShortTag(); !strings.HasPrefix(tag, "!!") {
		d.fail(n, at, "the tag %s does not belong here; write only the string", tag)
		return ""
	}
	return n.Value
}

// number returns an unsigned number of so many bits. Keys of JSON objects are
// strings, so quotes do not matter.
func (d *decoder) number(n *yaml.Node, at *path, bits int) uint64 {
	s := d.text(n, at)
	if d.err != nil {
		return 0
	}
	base, digits := 10, s
	if len(s) > 2 && s[0] == '0' {
		switch s[1] {
		case 'x':
			base, digits = 16, s[2:]
		case 'o':
			base, digits = 8, s[2:]
		case 'b':
			base, digits = 2, s[2:]
		}
	}
	v, err := strconv.ParseUint(digits, base, bits)
	if err != nil || base == 10 && len(s) > 1 && s[0] == '0' {
		d.fail(n, at, "%q is no number from 0 to %d", s, uint64(1)<<bits-1)
	}
	return v
}

func (d *decoder) port(n *yaml.Node, at *path) uint16 { return uint16(d.number(n, at, 16)) }

// list decodes a list, item by item. A nil node is an absent one, and empty.
func list[T any](d *decoder, n *yaml.Node, at *path, item func(*yaml.Node, *path) T) []T {
	if n == nil {
		return []T{}
	}
	n, ok := d.visit(n, at)
	if !ok || blank(n) {
		return []T{}
	}
	if n.Kind != yaml.SequenceNode {
		d.fail(n, at, "%s where a list belongs", describe(n))
		return []T{}
	}
	items := make([]T, 0, len(n.Content))
	for i, c := range n.Content {
		items = append(items, item(c, &path{up: at, item: i}))
		if d.err != nil {
			break
		}
	}
	return items
}

// dict decodes a map whose keys are data. A key that comes twice is refused: one
// of its values would be lost.
func dict[K comparable, V any](d *decoder, n *yaml.Node, at *path, key func(*yaml.Node, *path) K, value func(*yaml.Node, *path) V) map[K]V {
	m := map[K]V{}
	if n == nil {
		return m
	}
	n, ok := d.visit(n, at)
	if !ok || blank(n) {
		return m
	}
	if n.Kind != yaml.MappingNode {
		d.fail(n, at, "%s where a map belongs", describe(n))
		return m
	}
	for i := 0; i+1 < len(n.Content) && d.err == nil; i += 2 {
		k := key(n.Content[i], at)
		if _, twice := m[k]; twice {
			d.fail(n.Content[i], at, "%v is there twice", k)
		}
		m[k] = value(n.Content[i+1], &path{up: at, key: fmt.Sprint(k)})
	}
	return m
}
