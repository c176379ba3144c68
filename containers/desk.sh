#!/bin/sh
# The desk of compose.yaml: makes the bundles, gives each its volume, and deletes its own copy. Repeated, it does nothing.
# A real hospital has its own table; here the desk writes it into the bundle.
set -eu
umask 077
cd /desk
if [ -e given ]; then
  echo "the bundles are in their volumes"
  exit
fi
cp /hospitals/hospitals.yaml /hospitals/schema.yaml .
python /hospitals/make_hospitals.py
fedveil provision hospitals.yaml
cp public.csv hearts/server/
for name in cleveland hungary va-long-beach; do
  cp "hospitals/$name.csv" "hearts/clients/$name/table.csv"
  cp -R "hearts/clients/$name/." "/bundles/$name/"
  touch "/bundles/$name/given"
done
cp -R hearts/server/. /bundles/server/
touch /bundles/server/given given
rm -r hospitals hearts/clients hearts/server
