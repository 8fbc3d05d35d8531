package launchlog

import "maps"

// Resume is a log that was replayed before as far as l, whose exported fields
// were kept: more lines can be added to it. Of the starts it need not know more
// than their number.
func Resume(l Log) *Log {
	l.Values, l.Previous, l.known = maps.Clone(l.Values), nil, nil
	return &l
}
